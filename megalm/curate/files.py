"""Files that are there whole or not at all, whatever happens in between."""

import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from megalm.curate.document import Document
from megalm.disk import sync
from megalm.errors import MegalmError

PARTIAL = ".partial"


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the storage refuses, as a sentence."""
    try:
        yield
    except OSError as error:
        raise MegalmError(
            f"cannot write in {place}: {error.strerror or error}; mend that and run the same command again: it "
            "continues from the last chunk that was saved"
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing: under their names, on the disk, when this returns. Raises
    OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write_whole(path: Path, content: str) -> None:
    """Write a small text file: on the disk and under its name when this returns. Raises OSError."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


class ChunkFile:
    """A file in the making. It is under its name after commit(), and only then."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
        self._stream = self._partial.open("wb")

    def write(self, content: bytes) -> None:
        self._stream.write(content)

    def commit(self) -> None:
        """Put it on the disk and give it its name."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self.path)

    def abandon(self) -> None:
        """Remove it."""
        with contextlib.suppress(OSError):
            self._stream.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)


class LinesFile(ChunkFile):
    """JSON lines compressed by zstd."""

    def __init__(self, path: Path, level: int = 3) -> None:
        super().__init__(path)
        self._compressor = zstandard.ZstdCompressor(level=level).compressobj()

    def add(self, records: Sequence[Any]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.write(self._compressor.compress(lines.encode()))

    def commit(self) -> None:
        self.write(self._compressor.flush())
        super().commit()


class TableFile(ChunkFile):
    """Parquet, with a row group per call."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._arrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            self.abandon()
            raise MegalmError("output.text.format parquet needs pyarrow: pip install 'megalm[curate]'") from None
        text = self._arrow.string()
        self._schema = self._arrow.schema([(name, text) for name in ("id", "text", "source", "group", "metadata")])
        self._writer = parquet.ParquetWriter(self._stream, self._schema, compression="zstd")

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        rows = [
            {"group": None, **record, "metadata": json.dumps(record["metadata"], ensure_ascii=False)}
            for record in records
        ]
        self._writer.write_table(self._arrow.Table.from_pylist(rows, self._schema))

    def commit(self) -> None:
        self._writer.close()
        super().commit()


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of an intermediate file."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        pending = b""
        while block := stream.read(1 << 20):
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                yield Document(*json.loads(line))


def final_record(document: Document) -> dict[str, Any]:
    """What a line of the output holds. `source` and `group` are where the rest of megalm looks for them."""
    metadata = dict(document.metadata)
    record: dict[str, Any] = {"id": document.id, "text": document.text, "source": metadata.pop("source", "")}
    if isinstance(metadata.get("group"), str):
        record["group"] = metadata.pop("group")
    return record | {"metadata": metadata}
