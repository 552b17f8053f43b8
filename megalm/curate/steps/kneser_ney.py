"""Estimate an n-gram model with modified Kneser-Ney smoothing, and write it in ARPA format, which kenlm reads.

kenlm's package for Python can only ask a model; its own estimator, lmplz, has to be compiled with Boost. What is here
gives the same numbers (Chen and Goodman 1998, section 3; Heafield et al. 2013, section 3, for the order of things), in
memory: 200 to 500 bytes for each token of text at order 5.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalm.errors import MegalmError

Discounts = tuple[float, float, float]
"""What is taken off counts of 1, of 2, and of 3 or more."""
Rows = NDArray[np.int64]
FALLBACK: Discounts = (0.5, 1.0, 1.5)
"""Where too little text gives none; lmplz's, too."""
_BEGIN, _END, _FIRST = 0, 1, 2
_NEVER = -99


@dataclass
class _Grams:
    """The n-grams of one length n, each known by its row. prefix, suffix: rows of the (n-1)-grams that it begins and
    ends with; last: row of its last word; raw: how often it is there; begins: whether it begins a line; counts: what
    probabilities are made of, of the longest n-grams and of those that begin a line how often they are there, of others
    how many words stand before them; kept: not pruned."""

    prefix: Rows
    suffix: Rows
    last: Rows
    raw: Rows
    begins: NDArray[np.bool_]
    counts: Rows
    kept: NDArray[np.bool_]


class KneserNey:
    """An n-gram model of lines of words.

    Args:
        lines: of words, which are numbers from 0 up.
        order: length of the longest n-grams.
        prune: of each length, how often an n-gram may be there at most and be left out all the same; 0 keeps all. The
            last one given holds for what is longer. Words by themselves stay.
        discounts: of each length, in the place of what the text gives.

    Raises MegalmError if there is no text, or if longer n-grams would be kept whose parts are not.
    """

    def __init__(
        self, lines: Iterable[Sequence[int]], order: int, prune: Sequence[int] = (0,),
        discounts: Sequence[Discounts] = (),
    ) -> None:  # fmt: skip
        prune = prune or (0,)
        most = [0, *(prune[min(n, len(prune)) - 1] for n in range(2, order + 1))]
        if most != sorted(most):
            raise MegalmError(f"prune {list(prune)}: the parts of a kept n-gram must stay, so give ascending numbers")
        stream, left = _stream(lines)
        if not len(stream):
            raise MegalmError("there is no text to estimate a model from: name files that hold some")
        self._words, self._grams = _count(stream, left, most)
        self._discounts = [
            discounts[n] if discounts else _discounts(grams.counts[~grams.begins] if n == 0 else grams.counts)
            for n, grams in enumerate(self._grams)
        ]
        self._probabilities: list[NDArray[np.float64]] = []
        self._backoffs: list[NDArray[np.float64]] = []
        for n, (grams, discount) in enumerate(zip(self._grams, self._discounts)):
            contexts = len(self._grams[n - 1].raw) if n else 1
            taken = np.where(grams.counts < 3, np.array([0.0, *discount])[np.minimum(grams.counts, 3)], discount[2])
            found = np.where(grams.kept, grams.counts - taken, 0.0)
            totals = np.maximum(np.bincount(grams.prefix, grams.counts, contexts), 1e-300)
            backoff = 1 - np.bincount(grams.prefix, found, contexts) / totals
            # An unseen word is one more; the begin of a line is never foretold, one less.
            shorter = self._probabilities[-1][grams.suffix] if n else 1 / len(grams.raw)
            self._probabilities.append(found / totals[grams.prefix] + backoff[grams.prefix] * shorter)
            self._backoffs.append(backoff)

    @property
    def sizes(self) -> list[int]:
        """How many n-grams of each length the model holds."""
        return [int(grams.kept.sum()) + (n == 0) for n, grams in enumerate(self._grams)]

    def write(self, path: Path) -> None:
        """As ARPA, the words in decimal. Raises OSError."""
        words = [{_BEGIN: "<s>", _END: "</s>"}.get(word, str(word - _FIRST)) for word in self._words.tolist()]
        names = words
        with path.open("w", encoding="ascii") as stream:
            stream.write("\\data\\\n")
            stream.writelines(f"ngram {n}={size}\n" for n, size in enumerate(self.sizes, 1))
            for n, grams in enumerate(self._grams):
                probabilities = _log10(self._probabilities[n])
                backoffs = _log10(self._backoffs[n + 1]) if n + 1 < len(self._grams) else None
                stream.write(f"\n\\{n + 1}-grams:\n")
                if n == 0:
                    probabilities[grams.begins] = _NEVER
                    stream.write(f"{_log10(self._backoffs[0] / len(words))[0]:.7g}\t<unk>\t0\n")
                else:
                    ends = zip(grams.prefix.tolist(), grams.last.tolist())
                    names = [f"{names[prefix]} {words[last]}" for prefix, last in ends]
                for row in np.flatnonzero(grams.kept).tolist():
                    backoff = "" if backoffs is None else f"\t{backoffs[row]:.7g}"
                    stream.write(f"{probabilities[row]:.7g}\t{names[row]}{backoff}\n")
            stream.write("\n\\end\\\n")


def _stream(lines: Iterable[Sequence[int]]) -> tuple[Rows, Rows]:
    """All lines one behind the other, each between its begin and its end, and of each place how many words there are
    from it to the end of its line."""
    words, sizes = array("q"), array("q")
    for line in lines:
        words.append(_BEGIN)
        words.extend(word + _FIRST for word in line)
        words.append(_END)
        sizes.append(len(line) + 2)
    if not words:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ends = np.cumsum(np.frombuffer(sizes, np.int64))
    return np.frombuffer(words, np.int64), np.repeat(ends, np.frombuffer(sizes, np.int64)) - np.arange(len(words))


def _count(stream: Rows, left: Rows, most: Sequence[int]) -> tuple[Rows, list[_Grams]]:
    """The words there are, and the n-grams of each length; most: as often may one be there and be pruned."""
    words, row, raw = np.unique(stream, return_inverse=True, return_counts=True)
    last = np.arange(len(words))
    nothing = np.zeros_like(last)
    found = [_Grams(nothing, nothing, last, raw, words == _BEGIN, raw, np.ones(len(words), bool))]
    shorter = row
    for n in range(2, len(most) + 1):
        places = np.flatnonzero(left >= n)
        keys = shorter[places] * len(words) + row[places + n - 1]
        _, first, inverse, raw = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        first = places[first]
        prefix, suffix, last = shorter[first], shorter[first + 1], row[first + n - 1]
        before = found[-1]
        before.counts = np.where(before.begins, before.raw, np.bincount(suffix, minlength=len(before.raw)))
        found.append(_Grams(prefix, suffix, last, raw, before.begins[prefix], raw, raw > most[n - 1]))
        shorter = np.full(len(stream), -1)
        shorter[places] = inverse
    found[0].counts = np.where(found[0].begins, 0, found[0].counts)
    return words, found


def _discounts(counts: Rows) -> Discounts:
    """Chen and Goodman 1998, equation 26."""
    once, twice, thrice, fourth = (float((counts == times).sum()) for times in (1, 2, 3, 4))
    if not (once and twice and thrice):
        return FALLBACK
    share = once / (once + 2 * twice)
    found = (1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * fourth / thrice)
    return found if all(0 <= taken <= times for times, taken in enumerate(found, 1)) else FALLBACK


def _log10(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log10(np.maximum(values, 10.0**_NEVER))
