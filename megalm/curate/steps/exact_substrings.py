"""Passages that are word for word in an earlier document, or earlier in the same one, are cut out.

As Lee et al. (2022, section 4.1) do with a suffix array, of which a corpus needs ten times its size. Here a document's
sketch has 4 bytes for each unit, and anchors: of every `length` units in a row, the run of half as many whose hash is
the least (winnowing, Schleimer et al. 2003). Two copies of a passage have the same anchors, so that merging compares
units only around anchors that are there twice, and finds where each match begins and ends.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Merging
from megalm.curate.steps.compiled import compiled
from megalm.curate.steps.records import Groups, Verdicts, id_hash
from megalm.curate.steps.units import Hashes, grams, units
from megalm.errors import MegalmError

_HEADER = np.dtype([("id", "<u8"), ("units", "<u4"), ("anchors", "<u4")])
_ANCHOR = np.dtype([("hash", "<u8"), ("place", "<u8")])
_PAIR = np.dtype([("key", "<u8"), ("here", "<i8"), ("there", "<i8")])
_VERDICT = np.dtype([("id", "<u8"), ("begin", "<u4"), ("end", "<u4")])
_WALKED = 4096  # units along which a pair is followed at once: on runs of one unit, more would take squares
_COMPARED = 16  # of the earlier places of an anchor, the first ones and the last ones


class ExactSubstringsSettings(Config):
    length: int = Field(50, ge=8)
    """Repeated passages of this many units or more are cut: words, or characters in Chinese (100 is nearer to 50 words
    there)."""
    min_left: int = Field(1, ge=1)
    """A document of which fewer units are left goes with its passages."""
    memory_mb: float = Field(1024, gt=0)
    """What sorting may take when sketches are merged. Beside it are files: 4 bytes a unit, 24 a document."""


class ExactSubstrings(Merging):
    """Case and characters must be the same, white space and punctuation do not count. Of an anchor that is there more
    often than 32 times, a place is compared with the first 16 and the last 16 before it."""

    kind: ClassVar[str] = "exact_substrings"
    Settings: ClassVar[type[Config]] = ExactSubstringsSettings
    settings: ExactSubstringsSettings

    def prepare(self) -> None:
        self.sketch([Document("first", "Some words to begin with.")])

    def sketch(self, documents: Sequence[Document]) -> bytes:
        pieces = []
        for document in documents:
            hashes = units(document.text).hashes
            if len(hashes) < self.settings.length:
                hashes = hashes[:0]  # no passage to cut, nothing to compare with
            anchors = self._anchors(hashes)
            header = np.array([(id_hash(document), len(hashes), len(anchors))], dtype=_HEADER)
            pieces += [header.tobytes(), (hashes >> np.uint64(32)).astype("<u4").tobytes(), anchors.tobytes()]
        return b"".join(pieces)

    def _anchors(self, hashes: Hashes) -> NDArray[Any]:
        width = self.settings.length // 2
        if len(hashes) < self.settings.length:
            return np.empty(0, dtype=_ANCHOR)
        runs = grams(hashes, width)
        places = _winnow(runs, self.settings.length - width + 1)
        anchors = np.empty(len(places), dtype=_ANCHOR)
        anchors["hash"], anchors["place"] = runs[places], places
        return anchors

    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        paths, memory = list(sketches), int(self.settings.memory_mb * 2**20)
        size = sum(path.stat().st_size for path in paths)
        scratch = verdicts / "scratch"
        told = {"documents": 0, "units": 0, "passages": 0, "units cut at most": 0}
        with Groups(scratch, _ANCHOR, "hash", size // _ANCHOR.itemsize, memory) as anchors:
            names = ("units", "ids", "begins")
            with contextlib.ExitStack() as stack:
                streams = [stack.enter_context((scratch / name).open("wb")) for name in names]
                for path in paths:
                    _gather(path, *streams, anchors, told)
            if told["units"]:
                stored, ids, begins = (
                    np.memmap(scratch / name, dtype, "r") for name, dtype in zip(names, ("<u4", "<u8", "<i8"))
                )
                passages = self._passages(anchors, stored, ids, begins, scratch / "pairs", memory, told)
            else:
                passages = iter(())
            Verdicts.write(verdicts, _VERDICT, passages, max(1, told["units"] // self.settings.length), memory)
        return told

    def _passages(
        self, anchors: Groups, stored: Any, ids: Any, begins: Any, folder: Path, memory: int, told: dict[str, int]
    ) -> Iterator[NDArray[Any]]:
        with Groups(folder, _PAIR, "key", 2 * told["units"] // self.settings.length + 1, memory) as pairs:
            for part in anchors.parts():
                here, there = _pairs(part["hash"].copy(), part["place"].astype(np.int64))
                found = np.empty(len(here), dtype=_PAIR)
                found["here"], found["there"] = here, there
                found["key"] = (here - there).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
                pairs.add(found)
            for part in pairs.parts():
                order = np.lexsort((part["here"], part["here"] - part["there"]))
                here, there = part["here"][order], part["there"][order]
                first, last = _extend(here, there, stored, begins, self.settings.length)
                of = np.searchsorted(begins, first, side="right") - 1
                rows = np.empty(len(first), dtype=_VERDICT)
                rows["id"], rows["begin"], rows["end"] = ids[of], first - begins[of], last - begins[of]
                told["passages"] += len(rows)
                told["units cut at most"] += int((last - first).sum())
                yield np.unique(rows)

    def judge(self, verdicts: Path) -> None:
        self._verdicts = Verdicts(verdicts, _VERDICT)

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        rows = self._verdicts.of(documents)
        return [self._cut(document, each) if len(each) else None for document, each in zip(documents, rows)]

    def _cut(self, document: Document, passages: NDArray[Any]) -> Rejection | None:
        text, found = document.text, units(document.text)
        pieces, last, left = [], 0, len(found)
        for begin, end in _joined(passages):
            start = int(found.starts[begin])
            stop = int(found.starts[end]) if end < len(found) else len(text)
            before = text[last:start]
            after = text[int(found.ends[end - 1]) : stop]
            # The marks behind a passage go with it; white space stays, once.
            space = after[len(after.rstrip()) :] if before and not before[-1].isspace() else ""
            pieces += [before, space]
            last, left = stop, left - (end - begin)
        if left < self.settings.min_left:
            return Rejection("all passages are in earlier documents", f"{len(found) - left} of {len(found)} units")
        document.text = "".join([*pieces, text[last:]]).strip()
        document.metadata["repeated_units"] = len(found) - left
        return None


def _gather(
    path: Path, stream: BinaryIO, ids: BinaryIO, begins: BinaryIO, anchors: Groups, told: dict[str, int]
) -> None:
    """The units of all documents one behind the other; of each document its id's hash and where its units begin."""
    held: list[NDArray[Any]] = []
    with open(path, "rb") as file:
        while data := file.read(_HEADER.itemsize):
            header = np.frombuffer(data, dtype=_HEADER)[0] if len(data) == _HEADER.itemsize else None
            size = int(header["units"]) * 4 + int(header["anchors"]) * _ANCHOR.itemsize if header is not None else -1
            body = file.read(size) if size >= 0 else b""
            if header is None or len(body) != size:
                raise MegalmError(
                    f"the sketches in {path} are cut off within a document: remove the file and run its task again"
                )
            count = int(header["units"])
            stream.write(body[: 4 * count])
            ids.write(header["id"].tobytes())
            begins.write(np.array(told["units"], dtype="<i8").tobytes())
            places = np.frombuffer(body[4 * count :], dtype=_ANCHOR).copy()
            places["place"] += np.uint64(told["units"])
            held.append(places)
            told["documents"] += 1
            told["units"] += count
            if len(held) == 4096:
                anchors.add(np.concatenate(held))
                held.clear()
    if held:
        anchors.add(np.concatenate(held))


def _joined(passages: NDArray[Any]) -> list[tuple[int, int]]:
    """Passages of a document, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(zip(passages["begin"].tolist(), passages["end"].tolist())):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


@compiled
def _winnow(values: Any, window: int) -> Any:
    """Places of the least value of every `window` values in a row, of equal ones the last; each place once."""
    places = np.empty(len(values), dtype=np.int64)
    count, least = 0, -1
    for end in range(window - 1, len(values)):
        begin = end - window + 1
        if least < begin:
            least = begin
            for i in range(begin + 1, end + 1):
                if values[i] <= values[least]:
                    least = i
        elif values[end] <= values[least]:
            least = end
        if count == 0 or places[count - 1] != least:
            places[count] = least
            count += 1
    return places[:count]


@compiled
def _pairs(hashes: Any, places: Any) -> Any:
    """Places of the same hash, each with earlier ones. Sorted by hash, places ascending."""
    total, first = 0, 0
    for i in range(len(hashes)):
        if hashes[i] != hashes[first]:
            first = i
        total += min(i - first, 2 * _COMPARED)
    here, there = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    count, first = 0, 0
    for i in range(len(hashes)):
        if hashes[i] != hashes[first]:
            first = i
        some = min(i - first, 2 * _COMPARED)
        for k in range(some):
            here[count], there[count] = places[i], places[first + k if k < _COMPARED else i - some + k]
            count += 1
    return here, there


@compiled
def _after(begins: Any, place: int) -> int:
    """np.searchsorted(begins, place, "right"), which takes seconds to compile."""
    low, high = 0, len(begins)
    while low < high:
        middle = (low + high) // 2
        if place < begins[middle]:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def _extend(here: Any, there: Any, stored: Any, begins: Any, length: int) -> Any:
    """Where the later of two equal passages of at least `length` units begins and ends, within documents. Pairs are
    sorted by their distance and place, so that a passage with several anchors is walked along once."""
    first, last = np.empty(len(here), dtype=np.int64), np.empty(len(here), dtype=np.int64)
    count, distance, reached = 0, np.int64(-1), np.int64(-1)
    for i in range(len(here)):
        a, b = here[i], there[i]
        if a - b == distance and a < reached:
            continue
        one, other = _after(begins, a), _after(begins, b)
        end_a = begins[one] if one < len(begins) else len(stored)
        end_b = begins[other] if other < len(begins) else len(stored)
        low = min(a - begins[one - 1], b - begins[other - 1])
        back = 0
        while back < low and back < _WALKED and stored[a - back - 1] == stored[b - back - 1]:
            back += 1
        ahead = 0
        while ahead < _WALKED and a + ahead < end_a and b + ahead < end_b and stored[a + ahead] == stored[b + ahead]:
            ahead += 1
        distance, reached = a - b, a + ahead - (length if ahead == _WALKED else 0)
        if back + ahead >= length:
            first[count], last[count] = a - back, a + ahead
            count += 1
    return first[:count], last[:count]
