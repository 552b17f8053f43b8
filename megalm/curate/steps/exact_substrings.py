"""Passages that are word for word in an earlier document, or earlier in the same one, are cut out.

As Lee et al. (2022, section 4.1) do with a suffix array, of which a corpus needs ten times its size. Here every window
of `length` units that was there before is cut, and together these windows are the passages. To hash only few windows, a
document's sketch has anchors beside 4 bytes for each unit: of a window, the run of half as many units whose hash is the
least (winnowing, Schleimer et al. 2003). Equal windows have the same anchor, so that merging passes over the sketches
twice: it counts the anchors, and then hashes the windows of those that are there twice. One record a window, whatever
else looks like it: time is linear, and so is the disk.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Merging
from megalm.curate.steps.compiled import compiled
from megalm.curate.steps.records import Groups, Verdicts, id_hash, runs
from megalm.curate.steps.units import Hashes, grams, units
from megalm.errors import MegalmError

_HEADER = np.dtype([("id", "<u8"), ("units", "<u4"), ("anchors", "<u4")])
_ANCHOR = np.dtype([("hash", "<u8"), ("window", "<u4")])  # the first window of which it is the anchor
_WINDOW = np.dtype([("hash", "<u8"), ("id", "<u8"), ("begin", "<u4")])
_VERDICT = np.dtype([("id", "<u8"), ("begin", "<u4"), ("end", "<u4")])
_HELD = 1 << 16  # windows, before they are written
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class ExactSubstringsSettings(Config):
    length: int = Field(50, ge=8)
    """Repeated passages of this many units or more are cut: words, or characters in Chinese (100 is nearer to 50 words
    there)."""
    min_left: int = Field(1, ge=1)
    """A document of which fewer units are left goes with its passages."""
    memory_mb: float = Field(1024, gt=0)
    """What counting and sorting may take when sketches are merged, however often a passage is there. Beside it are
    files: 20 bytes for each unit near an anchor that is there twice; for most units, where sketches are many times
    larger than the memory."""


class ExactSubstrings(Merging):
    """Case and characters must be the same, white space and punctuation do not count. Two windows are the same if their
    hashes of 64 bits are."""

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
        every = grams(hashes, width)
        places, windows = _winnow(every, self.settings.length - width + 1)
        anchors = np.empty(len(places), dtype=_ANCHOR)
        anchors["hash"], anchors["window"] = every[places], windows
        return anchors

    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        paths, memory, length = list(sketches), int(self.settings.memory_mb * 2**20), self.settings.length
        told = {"documents": 0, "units": 0, "passages": 0, "units repeated": 0}
        counts = _anchor_counts(paths, memory, told)

        def passages(windows: NDArray[Any]) -> NDArray[Any]:
            """Windows of the same document that touch are one passage."""
            windows = windows[np.lexsort((windows["begin"], windows["id"]))]
            first = runs(windows["id"])
            first[1:] |= windows["begin"][1:] > windows["end"][:-1]
            rows = windows[first]
            rows["end"] = windows["end"][np.roll(first, -1)]
            told["units repeated"] += int((rows["end"] - rows["begin"]).sum())
            return rows

        with Groups(verdicts / "scratch", _WINDOW, "hash", told["units"], memory) as groups:
            count = 0
            for windows in _candidates(paths, counts, length):
                groups.add(windows)
                count += len(windows)
            del counts  # before the memory is sorting's
            rows = (_rows(windows, length) for windows in groups.repeats())
            told["passages"] = Verdicts.write(verdicts, _VERDICT, rows, count, memory, passages)
        return told

    def judge(self, verdicts: Path) -> None:
        self._verdicts = Verdicts(verdicts, _VERDICT)

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        rows = self._verdicts.of(documents)
        return [self._cut(document, each) if len(each) else None for document, each in zip(documents, rows)]

    def _cut(self, document: Document, passages: NDArray[Any]) -> Rejection | None:
        text, found = document.text, units(document.text)
        pieces, last, left = [], 0, len(found)
        for begin, end in zip(passages["begin"].tolist(), passages["end"].tolist()):
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


def _read(paths: Iterable[Path]) -> Iterator[tuple[int, NDArray[np.uint32], NDArray[Any]]]:
    """Of each document its id's hash, units and anchors."""
    for path in paths:
        with open(path, "rb") as file:
            while data := file.read(_HEADER.itemsize):
                header = np.frombuffer(data, dtype=_HEADER)[0] if len(data) == _HEADER.itemsize else None
                size = int(header["units"]) * 4 + int(header["anchors"]) * _ANCHOR.itemsize if header is not None else 0
                body = file.read(size)
                if header is None or len(body) != size:
                    raise MegalmError(
                        f"the sketches in {path} are cut off within a document: remove the file and run its task again"
                    )
                count = int(header["units"])
                yield (
                    int(header["id"]),
                    np.frombuffer(body, "<u4", count),
                    np.frombuffer(body, _ANCHOR, offset=4 * count),
                )


def _anchor_counts(paths: Sequence[Path], memory: int, told: dict[str, int]) -> NDArray[np.uint8]:
    """How often the hashes with the same first bits are there: 0, 1, or 2 for more. One place for each byte of the
    sketches, as far as memory goes, is many for each anchor, so that few of those that are there once share a place."""
    size = min(sum(path.stat().st_size for path in paths), memory)
    counts = np.zeros(1 << max(1, size.bit_length() - 1), dtype=np.uint8)
    for _, stored, anchors in _read(paths):
        told["documents"] += 1
        told["units"] += len(stored)
        _count(_places(anchors, counts), counts)
    return counts


def _places(anchors: NDArray[Any], counts: NDArray[np.uint8]) -> NDArray[np.uint64]:
    places: NDArray[np.uint64] = anchors["hash"] >> np.uint64(65 - len(counts).bit_length())
    return places


def _candidates(paths: Sequence[Path], counts: NDArray[np.uint8], length: int) -> Iterator[NDArray[Any]]:
    """The windows whose anchor is there twice, in order."""
    held: list[NDArray[Any]] = []
    count = 0
    for number, stored, anchors in _read(paths):
        again = counts[_places(anchors, counts)] > 1
        if again.any():
            ends = np.append(anchors["window"][1:], len(stored) - length + 1)
            begins = np.flatnonzero(np.repeat(again, ends - anchors["window"]))
            windows = np.empty(len(begins), dtype=_WINDOW)
            windows["hash"] = _window_hashes(stored, length)[begins]
            windows["id"], windows["begin"] = number, begins
            held.append(windows)
            count += len(windows)
            if count >= _HELD or len(held) == 1024:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def _rows(windows: NDArray[Any], length: int) -> NDArray[Any]:
    rows = np.empty(len(windows), dtype=_VERDICT)
    rows["id"], rows["begin"], rows["end"] = windows["id"], windows["begin"], windows["begin"] + length
    return rows


@compiled
def _winnow(values: Any, window: int) -> Any:
    """Places of the least value of every `window` values in a row, of equal ones the last; each place once, and with it
    the first window whose least value it is."""
    places, windows = np.empty(len(values), dtype=np.int64), np.empty(len(values), dtype=np.int64)
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
            places[count], windows[count] = least, begin
            count += 1
    return places[:count], windows[:count]


@compiled
def _count(places: Any, counts: Any) -> None:
    for place in places:
        if counts[place] < 2:
            counts[place] += 1


@compiled
def _window_hashes(stored: Any, length: int) -> Any:
    """A hash of every `length` units in a row: a polynomial, of which each step drops one term and adds one (Karp and
    Rabin 1987). The units are well mixed."""
    out = np.empty(len(stored) - length + 1, dtype=np.uint64)
    total, gone = np.uint64(0), np.uint64(1)
    for _ in range(length):
        gone *= _PRIME
    for i in range(len(stored)):
        total = total * _PRIME + np.uint64(stored[i])
        if i >= length:
            total -= gone * np.uint64(stored[i - length])
        if i >= length - 1:
            mixed = total ^ (total >> np.uint64(32))
            out[i - length + 1] = mixed * _PRIME
    return out
