"""The keyed permutation and the blend: bijections, exact shares, nothing that depends on ranks."""

import numpy as np
import pytest

from megalm.data.mixture import BLOCK, Blended, Mixture, block_counts
from megalm.data.order import Permutation
from megalm.errors import MegalmError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000, 4096, 65_537])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in range(3):
        images = Permutation(size, key)(np.arange(size))
        np.testing.assert_array_equal(np.sort(images), np.arange(size))


def test_permutation_depends_on_every_part_of_its_key() -> None:
    numbers = np.arange(10_000)
    orders = [Permutation(10_000, *key)(numbers) for key in ((1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b"))]
    for i, first in enumerate(orders):
        np.testing.assert_array_equal(
            first, Permutation(10_000, *[(1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b")][i])(numbers)
        )
        for second in orders[i + 1 :]:
            assert (first == second).sum() < 20  # one is expected by chance


def test_permutation_mixes() -> None:
    """Images are uncorrelated with numbers, neighbours part, and all of the range is reached from everywhere."""
    size = 100_000
    images = Permutation(size, "mix")(np.arange(size))
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.02
    assert np.median(np.abs(np.diff(images))) > size / 5
    counts = np.histogram2d(np.arange(size), images, bins=10)[0]
    statistic = ((counts - 1000) ** 2 / 1000).sum()  # chi-squared, 81 degrees of freedom
    assert statistic < 150
    identity = np.histogram2d(np.arange(size), np.arange(size), bins=10)[0]
    assert ((identity - 1000) ** 2 / 1000).sum() > 150  # the test would see a bad order


def test_permutation_of_a_range_too_large_to_store() -> None:
    size = 10**12 + 39
    numbers = np.unique(np.random.default_rng(0).integers(0, size, 10_000))
    images = Permutation(size, 7)(numbers)
    assert len(np.unique(images)) == len(numbers)
    assert images.min() >= 0
    assert images.max() < size
    np.testing.assert_array_equal(Permutation(size, 7)(numbers[::-1]), images[::-1])
    np.testing.assert_array_equal([Permutation(size, 7)(numbers[i]) for i in range(20)], images[:20])


CORPORA = [Blended("a", 5000, 0.7), Blended("b", 300, 0.25), Blended("c", 77, 0.05)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_block_has_exactly_its_shares_and_epochs_miss_nothing(shuffle: bool) -> None:
    mixture = Mixture(CORPORA, seed=3, shuffle=shuffle)
    corpus, window = mixture(np.arange(5 * BLOCK))
    for block in range(5):
        counts = np.bincount(corpus[block * BLOCK : (block + 1) * BLOCK], minlength=3)
        np.testing.assert_array_equal(counts, mixture.counts)
    np.testing.assert_allclose(mixture.counts / BLOCK, [0.7, 0.25, 0.05], atol=1 / BLOCK)
    for i, blended in enumerate(CORPORA):
        walked = window[corpus == i]
        epochs = [walked[start : start + blended.samples] for start in range(0, len(walked), blended.samples)]
        for epoch in epochs[:-1]:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(blended.samples))
        assert len(np.unique(epochs[-1])) == len(epochs[-1])
        if not shuffle:
            np.testing.assert_array_equal(walked, np.arange(len(walked)) % blended.samples)
        elif len(epochs) > 2:
            assert (epochs[0] != epochs[1]).any()


def test_number_by_number_is_the_same_however_far() -> None:
    mixture = Mixture(CORPORA, seed=3)
    for start in (0, BLOCK - 10, 10**9 - 10, 10**12):
        numbers = start + np.arange(20)
        corpus, window = mixture(numbers)
        single = [mixture(numbers[i : i + 1]) for i in range(20)]
        np.testing.assert_array_equal(corpus, [c[0] for c, _ in single])
        np.testing.assert_array_equal(window, [w[0] for _, w in single])


@pytest.mark.parametrize("corpora", [CORPORA, CORPORA[:1]])
def test_any_number_of_ranks_sees_the_same_samples(corpora: list[Blended]) -> None:
    """8 -> 2 -> 48 -> 1 ranks, each going on where the one before stopped."""
    global_batch, steps = 96, 5
    expected = list(zip(*(a.tolist() for a in Mixture(corpora, 1)(np.arange(4 * steps * global_batch)))))
    seen = []
    for phase, ranks in enumerate((8, 2, 48, 1)):
        for step in range(steps):
            start = (phase * steps + step) * global_batch
            rows = {}
            for rank in range(ranks):
                numbers = start + rank + ranks * np.arange(global_batch // ranks)
                corpus, window = Mixture(corpora, 1)(numbers)
                rows |= dict(zip(numbers.tolist(), zip(corpus.tolist(), window.tolist())))
            seen += [rows[n] for n in sorted(rows)]
    assert seen == expected


@pytest.mark.parametrize(
    ("weights", "block", "counts"),
    [
        ([1], 10, [10]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([1000, 1e-6], 10, [9, 1]),
        ([1e-9, 1e-9, 1], 4, [1, 1, 2]),
        ([1e-9, 5, 5], 10, [1, 4, 5]),
    ],
)
def test_block_counts(weights: list[float], block: int, counts: list[int]) -> None:
    found = block_counts(weights, block)
    assert found.sum() == block
    assert sorted(found) == sorted(counts)
    assert (found >= 1).all()


def test_too_many_corpora() -> None:
    with pytest.raises(MegalmError, match="more than 4096"):
        Mixture([Blended(str(i), 1, 1.0) for i in range(BLOCK + 1)], 0)
