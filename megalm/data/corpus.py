"""Corpora: documents gathered from files and folders, written as one JSONL file of {"text", "source"} and, where
documents belong together, {"group"}.

`.jsonl`, `.jsonl.gz` and `.jsonl.zst` are read and written. The order of documents is the order of the inputs, and
within a folder the order of sorted paths, so the same inputs give the same file byte for byte.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

from megalm.errors import MegalmError

TEXT_EXTENSIONS = (".txt", ".text", ".md", ".rst", ".py")
"""Files of a folder that are taken by default, each with or without .gz or .zst; .jsonl always is."""
COMPRESSIONS = (".gz", ".zst")
LARGEST_WINDOW = 2**31
"""Of zstd, in bytes: large dumps are often compressed with `--long=31`."""
MAX_CHARACTERS = 100_000
"""A longer text file becomes several documents, cut at paragraph or line ends, so that a book can be held out in part
and tokenised in parallel. JSONL documents are never cut."""


@dataclass(frozen=True)
class Document:
    """A text and where it came from."""

    text: str
    source: str
    group: str | None = None
    """Documents of one group are held out together (megalm/data/shards.py); None: this one stands alone."""


@dataclass
class Tally:
    """What was taken and what was left out, by reason."""

    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One clause for the closing line of a command."""
        return f"{self.documents:,} documents, {self.characters:,} characters; skipped: {listed(self.skipped)}"


def listed(skipped: Mapping[str, int]) -> str:
    """What was left out, for a sentence: 2 empty, 1 not JSON."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "nothing"


def gather(
    inputs: Sequence[str | Path],
    tally: Tally,
    extensions: Sequence[str] = TEXT_EXTENSIONS,
    text_field: str = "text",
    max_characters: int = MAX_CHARACTERS,
) -> Iterator[Document]:
    """Documents of files and folders; what cannot be read as text is counted in tally.skipped.

    Links to folders are followed, each folder once. A file named directly is read whatever its extension. A text file
    is held in memory whole, at several times its size; a JSONL file is read line by line.

    Raises MegalmError when an input is missing or cannot be opened, or a compressed file is cut short.
    """
    wanted = {extension if extension.startswith(".") else f".{extension}" for extension in extensions} | {".jsonl"}
    for given in map(Path, inputs):
        if not given.exists():
            raise MegalmError(f"there is no file or folder {given}: correct the path")
        for path in map(Path, walk(str(given), tally.skipped)) if given.is_dir() else [given]:
            kind = content_suffix(path)
            if given.is_dir() and kind not in wanted:
                tally.skipped["of another extension"] += 1
            elif given.is_dir() and not _opens(path):
                tally.skipped["unreadable files"] += 1
            elif kind == ".jsonl":
                yield from JsonlReader([path], tally, text_field)
            else:
                yield from _text_file(path, str(path), tally, max_characters)


def walk(folder: str, skipped: Counter[str], without: Collection[str] = ()) -> Iterator[str]:
    """What is in a folder and below, sorted, also behind links. skipped: counts folders that are not entered. without:
    names of folders that are passed over.

    Raises MegalmError if the folder itself cannot be read.
    """

    def on_error(error: OSError) -> None:
        if error.filename == folder:
            raise MegalmError(f"cannot read the folder {folder}: {error.strerror}") from error
        skipped["unreadable folders"] += 1

    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=on_error, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in visited:
            skipped["links to folders already read"] += 1
            folders.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if name not in without)
        yield from (os.path.join(parent, name) for name in sorted(files))


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, plain or compressed. Raises MegalmError if it cannot be opened, is damaged or cut short."""
    with _open_raw(path) as raw, decompressed(raw, path) as stream:
        yield from _lines(stream, path)


def _opens(path: Path) -> bool:
    """Whether it is a regular file (a named pipe would block) that may be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        path.open("rb").close()
    except OSError:
        return False
    return True


def content_suffix(path: Path) -> str:
    """Extension without the one of compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def _text_file(path: Path, source: str, tally: Tally, max_characters: int) -> Iterator[Document]:
    content = b"".join(read_lines(path))
    if b"\0" in content[:8192]:
        tally.skipped["binary"] += 1
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        tally.skipped["not UTF-8"] += 1
        return
    if not text.strip():
        tally.skipped["empty"] += 1
        return
    for part in split_text(text, max_characters):
        yield Document(part, source)


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Parts of at most max_characters whose concatenation is the text, cut after a blank line, a line or anywhere."""
    start = 0
    while len(text) - start > max_characters:
        limit, half = start + max_characters, start + max_characters // 2
        cuts = (text.rfind(mark, half, limit) + len(mark) for mark in ("\n\n", "\n", " "))
        stop = next((cut for cut in cuts if cut > half), limit)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


class JsonlReader:
    """Documents of JSONL files, plain or compressed, in order.

    `bytes_read` of `total_bytes` (both of the files as they lie on disk) say how far it is. Lines without usable text
    are counted in tally.skipped. Raises MegalmError for a missing, empty-named or cut-short file.
    """

    def __init__(self, paths: Sequence[str | Path], tally: Tally, text_field: str = "text") -> None:
        self.paths = [Path(path) for path in paths]
        self.bytes_read = 0
        for path in self.paths:
            if not path.is_file():
                raise MegalmError(f"there is no corpus file {path}: correct the path, or run tools/prepare_corpus.py")
            if content_suffix(path) != ".jsonl":
                raise MegalmError(
                    f"{path} is not a corpus (.jsonl, .jsonl.gz or .jsonl.zst): run tools/prepare_corpus.py on it first"
                )
        self.total_bytes = sum(path.stat().st_size for path in self.paths)
        self._tally = tally
        self._text_field = text_field

    def __iter__(self) -> Iterator[Document]:
        done = 0
        for path in self.paths:
            with _open_raw(path) as raw, decompressed(raw, path) as stream:
                for line in _lines(stream, path):
                    self.bytes_read = done + raw.tell()
                    document = self._parse(line, str(path))
                    if document is not None:
                        yield document
            done += path.stat().st_size
            self.bytes_read = done

    def _parse(self, line: bytes, path: str) -> Document | None:
        if not line.strip():
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the latter: a thousand brackets in each other
            self._tally.skipped["not JSON"] += 1
            return None
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            self._tally.skipped[f"without a text field {self._text_field!r}"] += 1
            return None
        if not text.strip():
            self._tally.skipped["empty"] += 1
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            self._tally.skipped["not Unicode (lone surrogates)"] += 1
            return None
        source, group = record.get("source"), record.get("group")
        return Document(text, source if isinstance(source, str) else path, group if isinstance(group, str) else None)


def _open_raw(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise MegalmError(f"cannot read {path}: {error.strerror}") from error


def decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    """The content of an open file, which its suffix says how to decompress."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """A zstd file of any number of frames; one that ends inside a frame is an error, which zstandard's own stream
    reader passes over in silence."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
        self._pending = b""
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            compressed = self._raw.read(1 << 17)
            if not compressed:
                if self._inside_frame:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._pending = self._decompress(compressed)
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def _decompress(self, compressed: bytes) -> bytes:
        parts = []
        while compressed:
            parts.append(self._decompressor.decompress(compressed))
            self._inside_frame = not self._decompressor.eof
            compressed = self._decompressor.unused_data if self._decompressor.eof else b""
            if self._decompressor.eof:
                self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
        return b"".join(parts)


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from stream
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise MegalmError(f"{path} is damaged or cut short ({error}): copy it again, or leave it out") from error


def write_corpus(
    documents: Iterable[Document], output: str | Path, tally: Tally, report: Callable[[Tally], None] | None = None
) -> None:
    """Write documents to a .jsonl, .jsonl.gz or .jsonl.zst file, without exact repetitions of earlier ones.

    The file appears under its name when it is whole. `report` is called after every document. What was written is
    remembered as hashes in the memory of this one process: about 124 MB per million documents.

    Raises MegalmError when nothing is left to write, or the file cannot be written.
    """
    output = Path(output)
    if content_suffix(output) != ".jsonl":
        raise MegalmError(f"the corpus {output} must be named .jsonl, .jsonl.gz or .jsonl.zst")
    partial = output.with_name(output.name + ".partial")
    seen: set[bytes] = set()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as raw, _compressing(raw, output.suffix.lower()) as stream:
            for document in documents:
                digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
                if digest in seen:
                    tally.skipped["repeated"] += 1
                    continue
                seen.add(digest)
                record = {"text": document.text, "source": document.source}
                if document.group is not None:
                    record["group"] = document.group
                stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                tally.documents += 1
                tally.characters += len(document.text)
                if report is not None:
                    report(tally)
        if tally.documents == 0:
            raise MegalmError(f"no document was found to write to {output} ({tally.summary()}): name inputs with text")
        partial.replace(output)
    except OSError as error:
        raise MegalmError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _compressing(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)  # type: ignore[return-value]
    if suffix == ".zst":
        return zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
    return raw
