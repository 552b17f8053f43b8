"""Of documents that are nearly the same, the best is kept.

MinHash (Broder 1997) over shingles of units, found by locality-sensitive hashing: a signature of 112 values is cut into
14 bands of 8, and two documents that agree in a band are the same for us. The chance of that for shingle sets of
Jaccard similarity s is 1 - (1 - s^8)^14: 0.92 at s = 0.8, 0.56 at 0.7, 0.01 at 0.4 (as
FineWeb has it: Penedo et al. 2024, section 3.4). Documents that are linked through others are one cluster.

Shingles are of characters in Chinese and Japanese, of words elsewhere: words that a dictionary cuts are cut otherwise
after a small edit.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Merging
from megalm.curate.steps.compiled import compiled
from megalm.curate.steps.records import Groups, Verdicts, check_whole, id_hash, read
from megalm.curate.steps.units import grams, units
from megalm.errors import MegalmError

_VERDICT = np.dtype([("id", "<u8"), ("size", "<u4"), ("kept", "u1")])
_EDGE = np.dtype([("key", "<u8"), ("row", "<u8")])


class NearDuplicatesSettings(Config):
    bands: int = Field(14, ge=1)
    """More of them find more."""
    rows: int = Field(8, ge=1)
    """Values of a band: more of them ask for more similarity."""
    shingle: int = Field(5, ge=1)
    """Units of a shingle: words, or characters in Chinese and Japanese."""
    keep: str = "longest"
    """Which of a cluster: longest, first, or the name of a number in metadata, of which the highest (`score`)."""
    seed: int = 1
    """Of the hash functions."""
    memory_mb: float = Field(1024, gt=0)
    """What sorting may take when sketches are merged. The clusters themselves take 28 bytes a document, in files."""

    @field_validator("keep")
    @classmethod
    def _no_slip(cls, keep: str) -> str:
        """Metadata have any name; but one that is nearly a word of ours is a slip, better told now than by merge()."""
        words = ("longest", "first")
        if keep not in words and (meant := difflib.get_close_matches(keep.lower(), words, n=1, cutoff=0.75)):
            raise ValueError(f"{keep} is neither longest, first nor a number's name; did you mean {meant[0]}?")
        return keep


class NearDuplicates(Merging):
    """A document that is kept learns how many there are of it: metadata `near_duplicates` (FineWeb2 repeats documents
    by that number)."""

    kind: ClassVar[str] = "near_duplicates"
    Settings: ClassVar[type[Config]] = NearDuplicatesSettings
    settings: NearDuplicatesSettings

    def __init__(self, settings: NearDuplicatesSettings) -> None:
        super().__init__(settings)
        random = np.random.Generator(np.random.PCG64(settings.seed))
        shape = settings.bands * settings.rows
        self._factors = random.integers(0, 2**32, shape, dtype=np.uint32) | np.uint32(1)
        self._addends = random.integers(0, 2**32, shape, dtype=np.uint32)
        self._sketch = np.dtype([("id", "<u8"), ("priority", "<f8"), ("keys", "<u8", (settings.bands,))])

    def signatures(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """A row of bands * rows values for each text. The share of equal values of two rows estimates the Jaccard
        similarity of the texts' shingles. Of a text without units all are 2^32 - 1."""
        lowered = [text.lower() for text in texts]
        found = units("\n".join(lowered))
        places = np.cumsum([0, *(len(text) + 1 for text in lowered)])
        bounds = np.searchsorted(found.starts, places)
        width = self.settings.shingle
        every = grams(found.hashes, width)
        begins, ends = bounds[:-1].copy(), bounds[1:] - width + 1
        short = np.flatnonzero((ends <= begins) & (bounds[1:] > bounds[:-1]))
        if len(short):  # fewer units than a shingle has: one shingle of all of them
            extra = [grams(found.hashes[bounds[i] : bounds[i + 1]], width) for i in short]
            begins[short] = len(every) + np.arange(len(short))
            ends[short] = begins[short] + 1
            every = np.concatenate([every, *extra])
        out = np.empty((len(texts), len(self._factors)), dtype=np.uint32)
        _minima((every >> np.uint64(32)).astype(np.uint32), begins, ends, self._factors, self._addends, out)
        return out

    def prepare(self) -> None:
        self.sketch([Document("first", "Some words to begin with.")])

    def sketch(self, documents: Sequence[Document]) -> bytes:
        records = np.empty(len(documents), dtype=self._sketch)
        signatures = self.signatures([document.text for document in documents])
        records["id"] = [id_hash(document) for document in documents]
        records["priority"] = [self._priority(document) for document in documents]
        records["keys"] = _band_keys(signatures.reshape(len(documents), self.settings.bands, self.settings.rows))
        empty = (signatures == np.uint32(0xFFFFFFFF)).all(axis=1)
        records["keys"][empty] = records["id"][empty, None]  # like nothing else
        return records.tobytes()

    def _priority(self, document: Document) -> float:
        if self.settings.keep == "longest":
            return float(len(document.text))
        if self.settings.keep == "first":
            return 0.0
        value = document.metadata.get(self.settings.keep)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else float("-inf")

    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        paths, memory = list(sketches), int(self.settings.memory_mb * 2**20)
        total = sum(check_whole(path, self._sketch) for path in paths)
        scratch = verdicts / "scratch"
        with Groups(scratch, _EDGE, "key", total * self.settings.bands, memory) as groups:

            def column(name: str, dtype: Any) -> NDArray[Any]:
                """In a file, so that the system may take its memory back."""
                return np.memmap(scratch / name, dtype, "w+", shape=(max(1, total),))[:total]

            parents, priorities, ids = (
                column("parents", np.int64),
                column("priorities", np.float64),
                column("ids", "<u8"),
            )
            place, numbered = 0, False
            for records in read(paths, self._sketch):
                rows = np.arange(place, place + len(records), dtype=np.int64)
                parents[place : place + len(records)] = rows
                priorities[place : place + len(records)] = records["priority"]
                ids[place : place + len(records)] = records["id"]
                edges = np.empty((len(records), self.settings.bands), dtype=_EDGE)
                edges["key"], edges["row"] = records["keys"], rows[:, None]
                groups.add(edges.reshape(-1))
                place += len(records)
                numbered = numbered or bool(np.isfinite(records["priority"]).any())
            if total and not numbered:
                raise MegalmError(
                    f"near_duplicates.keep: no document has a number {self.settings.keep} in its metadata: name one "
                    "that they have, or write longest or first"
                )
            for part in groups.parts():
                _unite(parents, part["key"].copy(), part["row"].astype(np.int64))
            sizes, best = column("sizes", np.int32), column("best", np.int64)
            _clusters(parents, priorities, sizes, best)
            Verdicts.write(verdicts, _VERDICT, _judged(ids, parents, sizes, best), total, memory)
            clusters = _histogram(sizes)
            del parents, priorities, ids, sizes, best  # before their files
        removed = sum((size - 1) * count for size, count in clusters.items())
        return {
            "documents": total,
            "clusters": sum(clusters.values()),
            "removed": removed,
            "largest cluster": max(clusters, default=1 if total else 0),
            "clusters by size": {str(size): count for size, count in clusters.items()},
        }

    def judge(self, verdicts: Path) -> None:
        self._verdicts = Verdicts(verdicts, _VERDICT)

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        answers: list[Rejection | None] = []
        for document, rows in zip(documents, self._verdicts.of(documents)):
            size, kept = (int(rows["size"][0]), bool(rows["kept"][0])) if len(rows) else (1, True)
            if size > 1 and kept:
                document.metadata["near_duplicates"] = size
            answers.append(None if kept else Rejection("near-duplicate of a document that is kept", f"one of {size}"))
        return answers


@compiled
def _minima(shingles: Any, begins: Any, ends: Any, factors: Any, addends: Any, out: Any) -> None:
    """The least value of each hash function factor * x + addend mod 2^32 over each text's shingles. x is well mixed, so
    that an odd factor and the high bits, which decide what is least, make a good family."""
    for text in range(len(begins)):
        minima = out[text]
        minima[:] = np.uint32(0xFFFFFFFF)
        for place in range(begins[text], ends[text]):
            x = shingles[place]
            for i in range(len(factors)):
                value = np.uint32(factors[i] * x + addends[i])
                minima[i] = value if value < minima[i] else minima[i]


def _band_keys(values: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """A hash of each band's values, with the band's number in it, so that all bands can be sorted together."""
    _, bands, rows = values.shape
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), values.shape[:2]).copy()
    for row in range(rows):
        keys ^= values[:, :, row]
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    keys *= np.uint64(0xBF58476D1CE4E5B9)
    return keys ^ (keys >> np.uint64(32))


@compiled
def _root(parents: Any, row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]  # path halving
        row = parents[row]
    return row


@compiled
def _unite(parents: Any, keys: Any, rows: Any) -> None:
    """Rows that follow each other with the same key are one cluster; its root is its first row."""
    for i in range(1, len(keys)):
        if keys[i] == keys[i - 1]:
            a, b = _root(parents, rows[i - 1]), _root(parents, rows[i])
            if a < b:
                parents[b] = a
            elif b < a:
                parents[a] = b


@compiled
def _clusters(parents: Any, priorities: Any, sizes: Any, best: Any) -> None:
    """sizes and best at each cluster's root; of equally good rows the first is the best. Afterwards parents are
    roots."""
    for row in range(len(parents)):
        root = _root(parents, row)
        parents[row] = root
        sizes[root] += 1
        if sizes[root] == 1 or priorities[row] > priorities[best[root]]:
            best[root] = row


def _judged(ids: Any, roots: Any, sizes: Any, best: Any) -> Iterator[NDArray[Any]]:
    step = 1 << 20
    for begin in range(0, len(ids), step):
        root = np.asarray(roots[begin : begin + step])
        size = sizes[root]
        chosen = np.flatnonzero(size > 1)
        rows = np.empty(len(chosen), dtype=_VERDICT)
        rows["id"], rows["size"] = ids[begin + chosen], size[chosen]
        rows["kept"] = best[root[chosen]] == begin + chosen
        yield rows


def _histogram(sizes: Any) -> dict[int, int]:
    """How many clusters there are of each size above one."""
    counted: dict[int, int] = {}
    step = 1 << 20
    for begin in range(0, len(sizes), step):
        part = np.asarray(sizes[begin : begin + step])
        for size, count in zip(*np.unique(part[part > 1], return_counts=True)):
            counted[int(size)] = counted.get(int(size), 0) + int(count)
    return dict(sorted(counted.items()))
