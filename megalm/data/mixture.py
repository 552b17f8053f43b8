"""Which sample of which corpus comes n-th: blending by weight with random access."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megalm.data.order import Permutation
from megalm.errors import MegalmError

BLOCK = 4096
"""Samples within which every corpus has exactly its share."""


@dataclass(frozen=True)
class Blended:
    """A corpus of the blend."""

    fingerprint: str
    samples: int
    """Windows it is cut into: the length of its epoch."""
    weight: float


class Mixture:
    """Global sample number -> (corpus, window).

    The numbers are cut into blocks of BLOCK. Each block holds an integer count of samples per corpus, the same in
    every block, in an order permuted by (seed, block). The samples of one corpus, in the order of their numbers, walk
    through its epochs: each window exactly once per epoch, permuted by (seed, epoch, fingerprint). Nothing depends on
    ranks or batches, and any number is reached in the same time.
    """

    def __init__(self, corpora: Sequence[Blended], seed: int, shuffle: bool = True) -> None:
        """shuffle=False leaves each corpus in its own order; blocks still interleave the corpora."""
        if len(corpora) > BLOCK:
            raise MegalmError(f"a blend of {len(corpora)} corpora is more than {BLOCK}: write some of them together")
        self.corpora = list(corpora)
        self.counts = block_counts([corpus.weight for corpus in corpora])
        """Samples of each corpus in a block."""
        self._seed = seed
        self._shuffle = shuffle
        self._block = lru_cache(4)(self._compute_block)
        self._permutation = lru_cache(4 * len(corpora))(self._compute_permutation)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus [n] and window [n] (int64) of global sample numbers [n]."""
        numbers = np.asarray(numbers, np.int64)
        if len(self.corpora) == 1:
            which, local = np.zeros_like(numbers), numbers
        else:
            which, local = np.empty_like(numbers), np.empty_like(numbers)
            blocks, slots = np.divmod(numbers, BLOCK)
            for block in np.unique(blocks):
                here = blocks == block
                corpus_of, rank_of = self._block(int(block))
                which[here] = corpus_of[slots[here]]
                local[here] = block * self.counts[which[here]] + rank_of[slots[here]]
        windows = np.empty_like(numbers)
        for i, corpus in enumerate(self.corpora):
            mine = which == i
            epochs, positions = np.divmod(local[mine], corpus.samples)
            if self._shuffle:
                for epoch in np.unique(epochs):
                    now = epochs == epoch
                    positions[now] = self._permutation(i, int(epoch))(positions[now])
            windows[mine] = positions
        return which, windows

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each slot of a block: its corpus, and how many earlier slots of the block have the same one."""
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        corpus_of = owners[Permutation(BLOCK, "blend", self._seed, block)(np.arange(BLOCK))]
        rank_of = np.empty(BLOCK, np.int64)
        by_corpus = np.argsort(corpus_of, kind="stable")
        rank_of[by_corpus] = np.arange(BLOCK) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        return corpus_of, rank_of

    def _compute_permutation(self, corpus: int, epoch: int) -> Permutation:
        blended = self.corpora[corpus]
        return Permutation(blended.samples, "epoch", self._seed, epoch, blended.fingerprint)


class ByLength:
    """An order in which the samples of a batch are of like length.

    The mixture's order is cut into blocks of at most BATCHES global batches, equal parts of an epoch where batches
    divide it. Each is sorted by length, and its batches permuted by (seed, block). The ranks of a step divide one
    batch, so they change nothing.
    """

    BATCHES = 64

    def __init__(self, mixture: Mixture, lengths: Sequence[np.ndarray], batch: int, seed: int) -> None:
        """lengths: of the samples of each corpus. batch: samples of a step, over all ranks."""
        epoch = max(1, sum(corpus.samples for corpus in mixture.corpora) // batch)
        self._mixture, self._lengths, self._seed = mixture, lengths, seed
        self._shape = epoch // -(-epoch // self.BATCHES), batch
        self._block = lru_cache(4)(self._compute_block)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus [n] and sample [n] (int64) of global sample numbers [n]."""
        numbers = np.asarray(numbers, np.int64)
        which, local = np.empty_like(numbers), np.empty_like(numbers)
        blocks, slots = np.divmod(numbers, self._shape[0] * self._shape[1])
        for block in np.unique(blocks):
            here = blocks == block
            which[here], local[here] = (values[slots[here]] for values in self._block(int(block)))
        return which, local

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        batches, size = self._shape
        which, local = self._mixture(block * batches * size + np.arange(batches * size))
        lengths = np.array([self._lengths[corpus][sample] for corpus, sample in zip(which, local)])
        order = np.argsort(lengths, kind="stable").reshape(batches, size)
        order = order[Permutation(batches, "sorted", self._seed, block)(np.arange(batches))].ravel()
        return which[order], local[order]


def block_counts(weights: Sequence[float], block: int = BLOCK) -> np.ndarray:
    """Samples per block of each corpus, int64 [corpora], summing to `block`.

    Largest remainders, with at least one each; so a share differs from its weight by less than 1 / block, or more
    where a corpus's weight asks for less than one sample per block.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights) * block
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    while counts.sum() != block:
        missing = block - counts.sum()
        errors = shares - counts
        if missing > 0:
            counts[np.argsort(-errors, kind="stable")[:missing]] += 1
        else:
            reducible = np.flatnonzero(counts > 1)
            counts[reducible[np.argmin(errors[reducible])]] -= 1
    return counts
