"""Text by units: a CJK character is one, of other scripts a word is one. What filters count and what duplicates share.

No word tokeniser: jieba and spaCy read half a megabyte a second, and words that a dictionary cuts are cut otherwise
after a small edit, which loses near-duplicates. A text is scanned once, as an array of code points, by a compiled loop.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.curate.steps.compiled import compiled

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]

SPACE, MARK, DIGIT, LETTER, CJK = range(5)
"""Classes of characters. MARK: punctuation, symbols, controls."""

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_LETTERS = f"{HAN}\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9f"  # and kana: no spaces between words
_CJK = re.compile(f"[{CJK_LETTERS}]+")
_APOSTROPHES = np.array([0x27, 0x2019], dtype=np.uint32)


@cache
def classes() -> NDArray[np.uint8]:
    """The class of every code point."""
    table = np.full(0x110000, MARK, dtype=np.uint8)
    every = "".join(map(chr, range(0x110000)))
    for pattern, kind in ((r"\s+", SPACE), (r"\w+", LETTER), (r"\d+", DIGIT), (_CJK, CJK)):
        for match in re.finditer(pattern, every):
            table[match.start() : match.end()] = kind
    # Vowel signs belong to the words of Indic scripts, Thai and Arabic; Python's \w does not have them.
    marks = np.flatnonzero(table == MARK)
    for code in marks[((marks >= 0x300) & (marks < 0x20000)) | ((marks >= 0xE0100) & (marks < 0xE01F0))].tolist():
        if unicodedata.category(chr(code))[0] == "M":
            table[code] = LETTER
    table[ord("_")] = MARK
    return table


def code_points(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a text, in order. starts, ends: in characters. hashes: of each. symbols: stretches between white
    space that hold no unit (a dash, `***`), which the papers' rules count as words too. classes: of each character."""

    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    hashes: Hashes
    symbols: int
    classes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.starts)


def units(text: str) -> Units:
    """Case counts: lower the text first where it should not (a lowered text may have another length)."""
    codes = code_points(text)
    of = classes()[codes]
    starts, ends = np.empty(len(codes), dtype=np.int32), np.empty(len(codes), dtype=np.int32)
    hashes = np.empty(len(codes), dtype=np.uint64)
    count, symbols = _scan(codes, of, _APOSTROPHES, starts, ends, hashes)
    return Units(starts[:count], ends[:count], hashes[:count], symbols, of)


def hash_of(word: str) -> int:
    """The hash that units() has for a single unit."""
    found = units(word)
    assert len(found) == 1, f"{word!r} is {len(found)} units"
    return int(found.hashes[0])


_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)
_SEED = np.uint64(0x2545F4914F6CDD1D)


@compiled
def _scan(codes: Any, of: Any, apostrophes: Any, starts: Any, ends: Any, hashes: Any) -> tuple[int, int]:
    count, symbols, marks, held = 0, 0, False, False
    i, n = 0, len(codes)
    while i < n:
        kind = of[i]
        if kind >= DIGIT:
            begin, h = i, _SEED
            while True:
                h = (h ^ np.uint64(codes[i])) * _PRIME
                h ^= h >> _SHIFT
                i += 1
                if kind == CJK or i >= n:
                    break
                if of[i] == DIGIT or of[i] == LETTER:
                    continue
                inside = i + 1 < n and (codes[i] == apostrophes[0] or codes[i] == apostrophes[1])
                if not (inside and of[i - 1] == LETTER and of[i + 1] == LETTER):
                    break
            h *= _MIX
            starts[count], ends[count], hashes[count] = begin, i, h ^ (h >> _SHIFT)
            count += 1
            held = True
            continue
        if kind == SPACE:
            symbols += marks and not held
            marks = held = False
        else:
            marks = True
        i += 1
    symbols += marks and not held
    return count, symbols


def grams(hashes: Hashes, width: int) -> Hashes:
    """Hashes of every `width` units that follow each other; one of all of them where there are fewer (none of none)."""
    width = min(width, len(hashes))
    if not width:
        return hashes
    size = len(hashes) - width + 1
    total = np.full(size, _SEED, dtype=np.uint64)
    for offset in range(width):  # Horner's rule, on all positions at once
        total *= _PRIME
        total += hashes[offset : offset + size]
        total ^= total >> _SHIFT
    total *= _MIX
    total ^= total >> np.uint64(32)
    return total
