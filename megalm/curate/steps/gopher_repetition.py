"""Gopher's rules on repetition (Rae et al. 2021, table A1): how much of a document says the same again."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.curate.steps.compiled import compiled
from megalm.curate.steps.profiles import ProfileSetting, thresholds
from megalm.curate.steps.units import _MIX, _PRIME, _SHIFT, units

Share = float | None
_LONGEST = 32  # n-grams
GramShares = dict[Annotated[int, Field(strict=False, ge=2, le=_LONGEST)], Annotated[float, Field(ge=0, le=1)]]
"""By n, which is text in a file: all keys there are."""


class RepetitionThresholds(Config):
    """A threshold of null is not asked. Shares of characters are of the whole text, white space and all."""

    max_repeated_lines: Share = Field(0.3, ge=0, le=1)
    """Share of lines that were there before."""
    max_repeated_paragraphs: Share = Field(0.3, ge=0, le=1)
    """Share of paragraphs that were there before."""
    max_characters_in_repeated_lines: Share = Field(0.2, ge=0, le=1)
    """Share of characters in them."""
    max_characters_in_repeated_paragraphs: Share = Field(0.2, ge=0, le=1)
    """Share of characters in them."""
    top_grams: GramShares = {2: 0.2, 3: 0.18, 4: 0.16}
    """n -> the most that the most frequent sequence of n words may take of the characters, if it is there three
    times."""
    repeated_grams: GramShares = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    """n -> the most that sequences of n words which were there before may take of the characters."""


class ChineseRepetitionThresholds(RepetitionThresholds):
    """A word has about 1.6 characters: sequences of characters are longer by that."""

    top_grams: GramShares = {3: 0.2, 5: 0.18, 6: 0.16}
    repeated_grams: GramShares = {8: 0.15, 10: 0.14, 11: 0.13, 13: 0.12, 14: 0.11, 16: 0.1}


class CodeRepetitionThresholds(RepetitionThresholds):
    """Brackets and imports repeat."""

    max_repeated_lines: Share = Field(0.6, ge=0, le=1)
    max_repeated_paragraphs: Share = Field(0.4, ge=0, le=1)
    max_characters_in_repeated_lines: Share = Field(0.4, ge=0, le=1)
    max_characters_in_repeated_paragraphs: Share = Field(0.3, ge=0, le=1)
    top_grams: GramShares = {2: 0.3, 3: 0.3, 4: 0.3}
    repeated_grams: GramShares = {10: 0.5}


class GopherRepetitionSettings(Config):
    profile: ProfileSetting = "auto"
    """Whose thresholds: auto takes those of the document's language."""
    en: RepetitionThresholds = RepetitionThresholds()
    """English: the paper's."""
    zh: ChineseRepetitionThresholds = ChineseRepetitionThresholds()
    """Chinese."""
    code: CodeRepetitionThresholds = CodeRepetitionThresholds()
    """Code."""
    other: RepetitionThresholds = RepetitionThresholds()
    """Any other language."""


class GopherRepetition(ByDocument):
    kind: ClassVar[str] = "gopher_repetition"
    Settings: ClassVar[type[Config]] = GopherRepetitionSettings
    settings: GopherRepetitionSettings

    def prepare(self) -> None:
        self.apply([Document("first", "Some words to begin with.")])

    def measure(self, document: Document) -> dict[str, float]:
        lines, _ = repeated(_LINES.split(document.text.strip()))
        return {"repeated lines": lines}

    def verdict(self, document: Document) -> Rejection | None:
        text = document.text
        if not text.strip():
            return Rejection("no text")
        _, asked = thresholds(self.settings, document)
        for what, pattern, pieces_most, characters_most in (
            ("paragraphs", _PARAGRAPHS, asked.max_repeated_paragraphs, asked.max_characters_in_repeated_paragraphs),
            ("lines", _LINES, asked.max_repeated_lines, asked.max_characters_in_repeated_lines),
        ):
            pieces, characters = repeated(pattern.split(text.strip()))
            if pieces_most is not None and pieces > pieces_most:
                return Rejection(f"repeated {what}", f"{pieces:.0%} of them")
            if characters_most is not None and characters / len(text) > characters_most:
                return Rejection(f"repeated {what}", f"{characters / len(text):.0%} of the characters")
        return _grams(text, asked.top_grams, asked.repeated_grams)


_LINES, _PARAGRAPHS = re.compile(r"\n+"), re.compile(r"\n{2,}")


def repeated(pieces: Sequence[str]) -> tuple[float, int]:
    """The share of pieces that were there before, and how many characters these have."""
    if len(set(pieces)) == len(pieces):
        return 0.0, 0
    seen: set[str] = set()
    again, characters = 0, 0
    for piece in pieces:
        if piece in seen:
            again += 1
            characters += len(piece)
        seen.add(piece)
    return again / len(pieces), characters


def _grams(text: str, top: Mapping[int, float], again: Mapping[int, float]) -> Rejection | None:
    found = units(text)
    wanted = np.zeros(_LONGEST + 1, dtype=np.uint8)
    for n in top:
        wanted[n] |= 1
    for n in again:
        wanted[n] |= 2
    tops, repeats = repetition(found.hashes, found.starts, found.ends, wanted)
    for n, most in sorted(top.items()):
        if tops[n] / len(text) > most:
            return Rejection(f"one {n}-gram over and over", f"{tops[n] / len(text):.0%} of the characters")
    for n, most in sorted(again.items()):
        if repeats[n] / len(text) > most:
            return Rejection(f"repeated {n}-grams", f"{repeats[n] / len(text):.0%} of the characters")
    return None


def repetition(hashes: Any, starts: Any, ends: Any, wanted: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """By n: characters that the most frequent n-gram takes where it is there at least three times (in a short
    text every name would be too much otherwise), and characters of n-grams
    that were there before, none counted twice. wanted: by n, 1 for the first, 2 for the second, 3 for both."""
    tops, repeats = np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.int64)
    if len(hashes):
        _count(hashes, starts, ends, wanted, tops, repeats)
    return tops, repeats


@compiled
def _count(hashes: Any, starts: Any, ends: Any, wanted: Any, tops: Any, repeats: Any) -> None:
    size = 1
    while size < 2 * len(hashes):
        size *= 2
    mask = np.uint64(size - 1)
    keys, counts = np.empty(size, dtype=np.uint64), np.zeros(size, dtype=np.int32)
    rolling = hashes.copy()
    for n in range(2, len(wanted)):
        last = len(hashes) - n + 1
        if last <= 0:
            break
        for i in range(last):
            h = (rolling[i] ^ (rolling[i] >> _SHIFT)) * _PRIME + hashes[i + n - 1]
            rolling[i] = h
        if wanted[n] == 0:
            continue
        counts[:] = 0
        free = 0  # first unit that no repeated n-gram has taken
        for i in range(last):
            key = rolling[i] * _MIX
            key ^= key >> _SHIFT
            slot = np.int64(key & mask)
            while counts[slot] > 0 and keys[slot] != key:
                slot = (slot + 1) & (size - 1)
            again = counts[slot] > 0
            keys[slot] = key
            counts[slot] += 1
            if wanted[n] & 1 and counts[slot] > 2:
                length = ends[i + n - 1] - starts[i + n - 1]
                for unit in range(i, i + n - 1):  # what stands between two units counts as one space
                    length += ends[unit] - starts[unit] + (starts[unit + 1] > ends[unit])
                tops[n] = max(tops[n], counts[slot] * length)
            if wanted[n] & 2 and again and i >= free:
                for unit in range(i, i + n):
                    repeats[n] += ends[unit] - starts[unit]
                free = i + n
