"""Records of fixed size on disk, grouped by a hash in bounded memory, and the verdicts that come of them.

Steps that must see all documents first (exact and near duplicates, paragraphs, substrings) write a few bytes of each.
What is equal meets by cutting the records into parts by the first bits of a hash, each small enough to be sorted in
memory: two passes over the records, and one more for every part that is too large after all, which is cut again by the
bits that follow. So neither memory nor open files grow with the records. The order in which records were written is
kept, so that "the first" is the same in every run.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalm.curate.document import Document
from megalm.errors import MegalmError

_ROWS = 1 << 18  # read at once
_SORTING = 4  # times the records: they, their order, and the sorted copy
_MOST_PARTS = 256  # files open at once, of each of at most three Groups in one; a process may often open 1024


def id_hash(document: Document) -> int:
    return xxhash.xxh3_64_intdigest(document.id.encode("utf-8", "surrogatepass"))


def read(paths: Iterable[Path], dtype: np.dtype[Any], rows: int = _ROWS) -> Iterator[NDArray[Any]]:
    """All records of the files, in order, `rows` at once."""
    for path in paths:
        check_whole(path, dtype)
        with open(path, "rb") as file:
            while data := file.read(rows * dtype.itemsize):
                yield np.frombuffer(data, dtype=dtype)


def check_whole(path: Path, dtype: np.dtype[Any]) -> int:
    """How many records a file has."""
    count, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise MegalmError(f"the sketches in {path} are cut off within a record: remove the file and run its task again")
    return count


class Groups:
    """Records by the first bits of the field `key` (an evenly spread uint64). As a context it removes its files."""

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], key: str, expected: int, memory: int, decided: int = 0
    ) -> None:
        """expected: about how many records, by which the number of parts is chosen so that sorting one takes `memory`
        bytes. decided: how many of the first bits are the same in all records."""
        self.folder, self.dtype, self.key, self.memory, self.decided = folder, dtype, key, memory, decided
        self.rows = max(1, memory // (_SORTING * dtype.itemsize))
        self.bits = max(0, int(np.ceil(np.log2(max(1, expected / self.rows)))))
        self.bits = min(self.bits, _MOST_PARTS.bit_length() - 1, 64 - decided)
        self.files: list[BinaryIO] = []

    def __enter__(self) -> "Groups":
        shutil.rmtree(self.folder, ignore_errors=True)  # of a merge that was killed
        self.folder.mkdir(parents=True)
        self.files = [(self.folder / str(part)).open("wb") for part in range(1 << self.bits)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self.files:
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, records: NDArray[Any]) -> None:
        if not self.bits:
            self.files[0].write(records.tobytes())
            return
        part = ((records[self.key] << np.uint64(self.decided)) >> np.uint64(64 - self.bits)).astype(np.uint16)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(len(self.files) + 1))
        sorted_records = records[order]
        for file, begin, end in zip(self.files, bounds, bounds[1:]):
            file.write(sorted_records[begin:end].tobytes())

    def parts(self) -> Iterator[NDArray[Any]]:
        """Each part's records, sorted by the key, equal keys in the order in which they were added.

        Sorting a part takes at most `memory` bytes, unless a single key has more records: those stay together.
        """
        for path in self._fitting():
            records = np.fromfile(path, dtype=self.dtype)
            path.unlink()
            yield records[np.argsort(records[self.key], kind="stable")]

    def repeats(self) -> Iterator[NDArray[Any]]:
        """The records whose key an earlier one has. Of a part only as many are in memory as fit, beside the keys that
        were seen: a key that is there very often costs no more than another."""
        for path in self._fitting():
            seen = np.empty(0, dtype=np.uint64)
            for records in read([path], self.dtype, self.rows):
                ordered = records[np.argsort(records[self.key], kind="stable")]
                keys = np.ascontiguousarray(ordered[self.key])
                fresh = runs(keys)
                fresh[fresh] = ~np.isin(keys[fresh], seen, assume_unique=True)
                yield ordered[~fresh]
                seen = np.concatenate([seen, keys[fresh]])
            path.unlink()

    def _fitting(self) -> Iterator[Path]:
        """Files of parts that can be sorted in `memory`, or have a single key."""
        for file in self.files:
            file.close()
        for path in (Path(file.name) for file in self.files):
            if not self._too_large(path):
                yield path
                continue
            count, decided = check_whole(path, self.dtype), self.decided + self.bits
            with Groups(path.with_suffix(".parts"), self.dtype, self.key, count, self.memory, decided) as finer:
                for records in read([path], self.dtype, self.rows):
                    finer.add(records)
                path.unlink()
                yield from finer._fitting()

    def _too_large(self, path: Path) -> bool:
        if path.stat().st_size * _SORTING <= self.memory:
            return False
        keys = _mapped(path, self.dtype)[self.key]
        return bool(keys.min() != keys.max())


def runs(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a run of equal rows begins, of columns that are sorted."""
    begins = np.zeros(len(columns[0]), dtype=np.bool_)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return begins


class Verdicts:
    """A table on disk, sorted by the hash of a document's id: several rows of one document lie together. The hashes are
    once more in a file of their own, so that looking one up touches little else."""

    IDS, ROWS = "ids.bin", "rows.bin"

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        if not (folder / self.ROWS).exists():
            raise MegalmError(f"there are no verdicts in {folder}: merge the sketches first")
        self.ids = _mapped(folder / self.IDS, np.dtype("<u8"))
        self.rows = _mapped(folder / self.ROWS, dtype)
        assert len(self.ids) == len(self.rows)

    def of(self, documents: Sequence[Document]) -> list[NDArray[Any]]:
        """The rows of each document, in the order in which they were written."""
        ids = np.fromiter(map(id_hash, documents), dtype=np.uint64, count=len(documents))
        begins, ends = (np.searchsorted(self.ids, ids, side=side) for side in ("left", "right"))
        return [self.rows[begin:end] for begin, end in zip(begins, ends)]

    @classmethod
    def write(
        cls, folder: Path, dtype: np.dtype[Any], rows: Iterable[NDArray[Any]], expected: int, memory: int,
        join: Callable[[NDArray[Any]], NDArray[Any]] = lambda part: part,
    ) -> int:  # fmt: skip
        """The table of `rows` in any order of documents; how many there are. join: given all rows of some documents,
        sorted by id, what stands in the table in their place."""
        count = 0
        with Groups(folder / "scratch-verdicts", dtype, "id", expected, memory) as groups:
            for each in rows:
                groups.add(each)
            # The rows come last: where they are, the table is whole.
            with open(folder / cls.IDS, "wb") as ids, open(folder / f"{cls.ROWS}.tmp", "wb") as table:
                for part in map(join, groups.parts()):
                    ids.write(part["id"].tobytes())
                    table.write(part.tobytes())
                    count += len(part)
            (folder / f"{cls.ROWS}.tmp").rename(folder / cls.ROWS)
        return count


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r") if check_whole(path, dtype) else np.empty(0, dtype=dtype)
