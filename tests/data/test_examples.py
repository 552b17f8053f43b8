"""Rows of examples against an obvious reference: every example in a row once, alone in its segment."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.batch import Batch
from megalm.data.examples import Example, ExampleSet, Rows, pack
from megalm.data.loader import Loader, held_out_batches
from megalm.errors import MegalmError

LENGTH, PAD = 32, 99


def some(count: int = 60, seed: int = 0, classes: int = 0) -> ExampleSet:
    """Examples of 2 to LENGTH positions, the first from row 1."""
    random = np.random.default_rng(seed)
    examples = []
    for row in range(1, count + 1):
        size = int(np.minimum(random.geometric(0.12) + 1, LENGTH))
        weights = (random.random(size) < 0.7).astype(np.uint8)
        weights[-1] = 1
        labels = random.integers(0, 2, (weights.sum(), classes)) if classes else random.integers(0, 90, size)
        examples.append((Example(random.integers(0, 90, size), labels, weights), 0, row))
    return ExampleSet.of(examples, ["rows.jsonl"])


def rows_of(*sets: ExampleSet, arrangement: str = "packed", **changes: Any) -> Rows:
    settings: dict[str, Any] = {
        "sequence_length": LENGTH,
        "pad_id": PAD,
        "arrangement": arrangement,
        "global_batch_size": 8,
        "facts": {"tokenizer": "t"},
    }
    return Rows(sets, [1.0] * len(sets), **settings | changes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_packing_holds_each_example_once_and_overfills_nothing(lengths: list[int]) -> None:
    members, starts = pack(np.array(lengths), 50)
    rows = [members[start:stop].tolist() for start, stop in zip(starts, starts[1:])]
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    used = [sum(lengths[example] for example in row) for row in rows]
    assert all(row for row in rows) and max(used) <= 50
    # Best fit never leaves two rows that one could hold.
    assert len(used) < 2 or sum(sorted(used)[:2]) > 50
    assert rows == sorted(map(sorted, rows))


def test_packing_is_best_fit_decreasing() -> None:
    # 7 goes to the row of 13 (room 7), not to that of 12 (room 8), which then holds 8.
    members, starts = pack(np.array([12, 13, 8, 7]), 20)
    assert [members[a:b].tolist() for a, b in zip(starts, starts[1:])] == [[0, 2], [1, 3]]
    # first fit in the order given would take three rows
    assert len(pack(np.array([7, 8, 12, 13]), 20)[1]) - 1 == 2


@pytest.mark.parametrize("arrangement", ["packed", "padded", "sorted"])
@pytest.mark.parametrize("classes", [0, 3])
def test_every_example_is_alone_in_its_segment(arrangement: str, classes: int) -> None:
    examples = some(classes=classes)
    rows = rows_of(examples, arrangement=arrangement)
    count = rows.corpora[0].samples
    assert count < 40 if arrangement == "packed" else count == 60
    met = []
    for number in range(count):
        batch = rows.batch([(0, number)], np.array([number]))
        for segment, (example, start, stop) in enumerate(rows.examples_in(number)):
            expected = examples[example]
            met.append(example)
            assert (batch.segment_ids[0] == segment).nonzero()[0].tolist() == list(range(start, stop))
            np.testing.assert_array_equal(batch.positions[0, start:stop], np.arange(stop - start))
            np.testing.assert_array_equal(batch.tokens[0, start:stop], expected.ids)
            np.testing.assert_array_equal(batch.labels[0, start:stop], expected.placed_labels)
            np.testing.assert_array_equal(batch.loss_mask[0, start:stop], expected.weights)
        assert (batch.tokens[0, stop:] == PAD).all() and not batch.loss_mask[0, stop:].any()
        assert (batch.segment_ids[0, stop:] == segment + 1).all()
        assert batch.tokens.shape[1] == (LENGTH if arrangement == "packed" else stop)
    assert sorted(met) == list(range(60))


@pytest.mark.parametrize("arrangement", ["packed", "padded", "sorted"])
def test_labels_of_trained_positions_make_the_batches_that_labels_of_all_made(tmp_path: Path, arrangement: str) -> None:
    """They were kept for every position, 0 where none is trained: batches and fingerprints are the same bit for bit."""
    random = np.random.default_rng(5)
    weights = [np.append(random.random(size - 1) < 0.3, True).astype(np.uint8) for size in random.integers(1, 30, 50)]
    ids = [random.integers(0, 90, len(each)) for each in weights]
    every = [random.integers(0, 2, (len(each), 7)) * each[:, None] for each in weights]
    made = [Example(a, b[c == 1], c) for a, b, c in zip(ids, every, weights)]
    ExampleSet.of([(example, 0, row) for row, example in enumerate(made, 1)], ["f"]).save(tmp_path / "kept")
    examples = ExampleSet.load(tmp_path / "kept")
    assert examples.labels.shape == (sum(map(np.sum, weights)), 7) and examples.labels.dtype == np.int32

    digest = hashlib.sha256(repr((7,)).encode())
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    for arrays, kind in ((ids, np.int32), (every, np.int32), (weights, np.uint8), ([offsets], np.int64)):
        digest.update(np.concatenate(arrays).astype(kind).tobytes())
    assert examples.fingerprint == digest.hexdigest()

    rows = rows_of(examples, arrangement=arrangement)
    numbers = range(rows.corpora[0].samples)
    batch = rows.batch([*((0, number) for number in numbers), None], np.arange(len(numbers) + 1))
    expected = np.zeros((*batch.tokens.shape, 7), np.int64)
    for place in numbers:
        for example, start, stop in rows.examples_in(place):
            expected[place, start:stop] = every[example]
    assert batch.labels.dtype == np.int64 and np.array_equal(batch.labels, expected)


def test_a_cut_keeps_the_labels_of_what_is_left() -> None:
    weights, labels = np.array([0, 1, 0, 1, 1]), np.arange(6).reshape(3, 2)
    cut = Example(np.arange(5), labels, weights).cut(4)
    assert cut.labels.tolist() == [[0, 1], [2, 3]]
    assert cut.placed_labels.tolist() == [[0, 0], [0, 1], [0, 0], [2, 3]]
    assert Example(np.arange(5), np.arange(5), weights).cut(2).labels.tolist() == [0, 1]


def test_rows_are_as_long_as_they_must_be() -> None:
    examples = some()
    lengths = examples.lengths
    one, two = int(lengths.argmin()), int(np.abs(lengths - 13).argmin())
    chosen: list[tuple[int, int] | None] = [(0, one), (0, two), None]

    def shape(**changes: Any) -> tuple[int, ...]:
        return rows_of(examples, **{"arrangement": "padded"} | changes).batch(chosen, np.zeros(3)).tokens.shape

    assert shape() == (3, lengths[two])
    assert shape(multiple=8) == (3, 8 * -(-lengths[two] // 8))
    assert shape(fixed_length=True) == (3, LENGTH)


def consumed(rows: Rows, ranks: int, steps: int, micro: int = 1, **options: Any) -> list[list[tuple[int, ...]]]:
    """Ids of the rows of each step, over all ranks."""
    taken: list[list[tuple[int, ...]]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        with Loader(
            rows, rank=rank, size=ranks, global_batch_size=8, micro_batch_size=micro, seed=3, prefetch=0, **options
        ) as loader:
            for step in range(steps):
                taken[step] += [
                    tuple(i for i in row if i != PAD) for batch in next(loader)[0] for row in batch.tokens.tolist()
                ]
    return [sorted(step) for step in taken]


@pytest.mark.parametrize("arrangement", ["packed", "padded", "sorted"])
def test_ranks_divide_the_same_steps(arrangement: str) -> None:
    one = consumed(rows_of(some(), some(20, seed=1), arrangement=arrangement), 1, 12)
    for ranks, micro in ((2, 4), (4, 1), (8, 1)):
        assert consumed(rows_of(some(), some(20, seed=1), arrangement=arrangement), ranks, 12, micro) == one
    assert consumed(rows_of(some(), some(20, seed=2), arrangement=arrangement), 1, 12) != one


def test_sorted_batches_are_of_like_length_and_lose_nothing() -> None:
    examples = some(800)

    def padding(arrangement: str) -> float:
        rows = rows_of(examples, arrangement=arrangement)
        order = rows.order(0, True)
        which, numbers = order(np.arange(800))
        assert not which.any() and sorted(numbers) == list(range(800)), "an epoch holds each once"
        lengths = examples.lengths[numbers].reshape(-1, 8)
        means = lengths.mean(axis=1)
        if arrangement == "sorted":
            assert 0.3 < (np.diff(means) > 0).mean() < 0.7, "batches come in no order of length"
        return 1 - lengths.sum() / (lengths.max(axis=1) * 8).sum()

    assert padding("sorted") < 0.05 < 0.3 < padding("padded")


def test_an_order_of_few_samples_does_not_mix_epochs() -> None:
    rows = rows_of(some(20), arrangement="sorted")
    _, numbers = rows.order(0, True)(np.arange(16))
    assert len(set(numbers.tolist())) == 16


def test_sorted_rows_cannot_go_on_with_another_batch() -> None:
    with Loader(
        rows_of(some(), arrangement="sorted"), rank=0, size=1, global_batch_size=8, micro_batch_size=8, seed=0
    ) as loader:
        state = next(loader)[1]
    other = rows_of(some(), arrangement="sorted", global_batch_size=4)
    options: dict[str, Any] = {"rank": 0, "size": 1, "global_batch_size": 4, "micro_batch_size": 4, "seed": 0}
    with pytest.raises(MegalmError, match="train.global_batch_size, by which the rows are sorted"):
        Loader(other, state=state, **options)
    with Loader(other, state=state, allowed=["train.global_batch_size"], **options) as loader:
        assert "sorted" in loader.restarted


def test_another_template_or_content_is_refused_by_name() -> None:
    options: dict[str, Any] = {"rank": 0, "size": 1, "global_batch_size": 8, "micro_batch_size": 8, "seed": 0}
    facts = {"tokenizer": "t", "template": "a"}
    with Loader(rows_of(some(), facts=facts), **options) as loader:
        state = next(loader)[1]
    Loader(rows_of(some(), facts=facts), state=state, **options).close()
    with pytest.raises(MegalmError, match="the chat template is no longer what the run was started with"):
        Loader(rows_of(some(seed=1), facts=facts | {"template": "b"}), state=state, **options)
    with pytest.raises(MegalmError, match="the content of data.sources is no longer"):
        Loader(rows_of(some(seed=1), facts=facts), state=state, **options)
    with pytest.raises(MegalmError, match="the content of data.sources is no longer"):
        Loader(rows_of(some(), facts=facts, arrangement="padded"), state=state, **options)


def test_held_out_rows_appear_once() -> None:
    examples = some(21)
    rows = rows_of(examples, arrangement="padded")
    met: list[Batch] = []
    for rank in range(2):
        met += held_out_batches(rows, rank=rank, size=2, micro_batch_size=4, sequences=100)
    trained = sum(int(batch.loss_mask.sum()) for batch in met)
    assert trained == examples.weights.sum() and len(met) == 6


def test_examples_come_back_from_disk(tmp_path: Any) -> None:
    examples = some()
    examples.save(tmp_path / "kept")
    again = ExampleSet.load(tmp_path / "kept")
    assert again.fingerprint == examples.fingerprint != some(seed=1).fingerprint
    assert again.origin(4) == ("rows.jsonl", 5) and len(again) == 60
    np.testing.assert_array_equal(again[7].ids, examples[7].ids)
    assert isinstance(again.ids, np.memmap)
    (tmp_path / "kept" / "ids.npy").write_bytes(b"no")
    with pytest.raises(MegalmError, match="damaged"):
        ExampleSet.load(tmp_path / "kept")
