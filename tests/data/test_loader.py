"""The loader against an obvious reference: the whole order in a list, cut into ranks and steps."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.data import shards
from megalm.data.batch import Batch
from megalm.data.config import DataConfig, SourceConfig
from megalm.data.index import ShardReader
from megalm.data.loader import Loader, held_out_batches
from megalm.data.packing import Packer, Windows, window_count
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.train import train

LENGTH = 64


def reference_row(stream: list[list[int]], window: int, length: int, pad: int, attend: bool) -> dict[str, list]:
    """One window, position by position, from the documents themselves."""
    flat = [(i, number) for number, ids in enumerate(stream) for i in ids]
    row: dict[str, list] = {key: [] for key in ("tokens", "labels", "loss_mask", "segment_ids", "positions")}
    begin = window * length
    segment, position, previous = 0, 0, None
    for place in range(begin, begin + length):
        present = place < len(flat)
        has_label = place + 1 < len(flat)
        document = flat[place][1] if present else "padding"
        if previous is not None and document != previous and not attend:
            segment, position = segment + 1, 0
        previous = document
        same = has_label and flat[place + 1][1] == document
        row["tokens"].append(flat[place][0] if present else pad)
        row["labels"].append(flat[place + 1][0] if has_label else pad)
        row["loss_mask"].append(float(has_label and (attend or same)))
        row["segment_ids"].append(segment)
        row["positions"].append(position)
        position += 1
    return row


@pytest.mark.parametrize("attend", [True, False])
@pytest.mark.parametrize("length", [7, 64, 1000])
def test_packing_against_the_reference(
    folder: Path, stream: list[list[int]], attend: bool, length: int, tokenizer: Tokenizer
) -> None:
    reader = ShardReader(folder)
    total = window_count(reader.tokens_total, length)
    packer = Packer(length, tokenizer.pad_id, attend)
    chosen = sorted({0, 1, 2, total // 2, total - 2, total - 1})
    batch = packer.batch([(reader, window) for window in chosen], np.array(chosen))
    for row, window in enumerate(chosen):
        expected = reference_row(stream, window, length, tokenizer.pad_id, attend)
        for name, values in expected.items():
            np.testing.assert_array_equal(getattr(batch, name)[row], values, err_msg=f"{name} of window {window}")
    assert {name: getattr(batch, name).dtype.name for name in expected} == {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "segment_ids": "int64",
        "positions": "int64",
    }


def test_the_reference_tells_packings_apart(folder: Path, stream: list[list[int]], tokenizer: Tokenizer) -> None:
    """Negative control: with the other meaning of document ends, or one window further, the comparison fails."""
    reader = ShardReader(folder)
    expected = reference_row(stream, 5, LENGTH, tokenizer.pad_id, attend=False)
    for packer, window in (
        (Packer(LENGTH, tokenizer.pad_id, True), 5),
        (Packer(LENGTH, tokenizer.pad_id, False), 6),
    ):
        batch = packer.batch([(reader, window)], np.zeros(1))
        assert any((getattr(batch, name)[0] != values).any() for name, values in expected.items())


@pytest.mark.parametrize("attend", [True, False])
def test_every_token_is_a_label_once(folder: Path, stream: list[list[int]], attend: bool) -> None:
    """Of all windows together; isolated documents give up only the label across their end."""
    reader = ShardReader(folder)
    packer = Packer(LENGTH, 0, attend)
    total = window_count(reader.tokens_total, LENGTH)
    batch = packer.batch([(reader, window) for window in range(total)], np.arange(total))
    trained = batch.labels[batch.loss_mask == 1]
    flat = [i for ids in stream for i in ids]
    first_of_documents = np.cumsum([0, *map(len, stream)])[:-1]
    expected = flat[1:] if attend else np.delete(flat, first_of_documents).tolist()
    assert trained.tolist() == expected


def test_shared_arrays_cannot_be_written(folder: Path) -> None:
    batch = Packer(LENGTH, 0, True).batch([(ShardReader(folder), 0)], np.zeros(1))
    with pytest.raises(ValueError, match="read-only"):
        batch.loss_mask[0, 0] = 0.0


@pytest.fixture(scope="module")
def second_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer_path: Path) -> Path:
    path = tmp_path_factory.mktemp("second") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text.upper()}) + "\n" for text in texts[:100]))
    shards.write([path], tokenizer_path, path.parent / "out")
    return path.parent / "out" / "train"


@pytest.fixture()
def config(folder: Path, second_folder: Path) -> DataConfig:
    sources = [SourceConfig(path=str(folder), weight=3.0), SourceConfig(path=str(second_folder), weight=1.0)]
    return DataConfig(sources=sources, prefetch=0)


def make(config: DataConfig, tokenizer: Tokenizer, **changes: Any) -> Loader:
    settings = {
        "rank": 0,
        "size": 1,
        "global_batch_size": 48,
        "micro_batch_size": 1,
        "seed": 1,
        "shuffle": config.shuffle,
        "prefetch": config.prefetch,
    } | changes
    length = settings.pop("sequence_length", LENGTH)
    samples = Windows(
        config.sources,
        tokenizer,
        length,
        attend_across_documents=config.attend_across_documents,
        verify_checksums=config.verify_checksums,
    )
    return Loader(samples, **settings)


def rows_of(batches: list[Batch]) -> dict[int, list[int]]:
    return {int(n): batch.tokens[i].tolist() for batch in batches for i, n in enumerate(batch.sample_ids)}


def take(loader: Loader, steps: int) -> tuple[list[dict[int, list[int]]], Any]:
    taken, state = [], None
    for _ in range(steps):
        batches, state = next(loader)
        taken.append(rows_of(batches))
    return taken, state


def test_resume_at_any_point_and_any_number_of_ranks(config: DataConfig, tokenizer: Tokenizer) -> None:
    whole, _ = take(make(config, tokenizer), 12)
    state = None
    seen: list[dict[int, list[int]]] = []
    for ranks in (8, 2, 48, 1):
        states = []
        steps: list[dict[int, list[int]]] = [{} for _ in range(3)]
        for rank in range(ranks):
            loader = make(config, tokenizer, rank=rank, size=ranks, state=state)
            taken, after = take(loader, 3)
            states.append(after)
            for merged, mine in zip(steps, taken):
                assert not merged.keys() & mine.keys()
                merged |= mine
        assert all(after == states[0] for after in states)
        state = json.loads(json.dumps(states[0]))  # it survives a file
        seen += steps
    assert [dict(sorted(step.items())) for step in seen] == whole
    assert [min(step) for step in whole] == [48 * step for step in range(12)]


def test_resume_inside_the_stretch_whose_order_is_computed_at_a_time(config: DataConfig, tokenizer: Tokenizer) -> None:
    loader = make(config, tokenizer, global_batch_size=16)
    steps = [(rows_of(batches), state) for batches, state in (next(loader) for _ in range(70))]
    for step in (0, 1, 30, 31, 32, 33, 63, 64):
        again = make(config, tokenizer, global_batch_size=16, state=steps[step][1])
        assert take(again, 3)[0] == [rows for rows, _ in steps[step + 1 : step + 4]]


def test_another_batch_size_goes_on_with_the_same_samples(config: DataConfig, tokenizer: Tokenizer) -> None:
    whole: dict[int, list[int]] = {}
    for step in take(make(config, tokenizer), 4)[0]:
        whole |= step
    _, state = take(make(config, tokenizer), 1)
    larger = take(make(config, tokenizer, global_batch_size=144, micro_batch_size=12, state=state), 1)[0][0]
    assert larger == {n: row for n, row in whole.items() if n >= 48}


def test_shapes_of_a_step(config: DataConfig, tokenizer: Tokenizer) -> None:
    batches, state = next(make(config, tokenizer, rank=1, size=2, micro_batch_size=8))
    assert [batch.tokens.shape for batch in batches] == [(8, LENGTH)] * 3
    assert [n for batch in batches for n in batch.sample_ids.tolist()] == list(range(1, 48, 2))
    assert state["samples"] == 48


def test_every_window_exactly_once_per_epoch(folder: Path, tokenizer: Tokenizer, stream: list[list[int]]) -> None:
    config = DataConfig(sources=[SourceConfig(path=str(folder))], prefetch=0)
    loader = make(config, tokenizer, global_batch_size=1)
    windows = window_count(sum(map(len, stream)), LENGTH)
    epochs = [[batches[0] for batches, _ in (next(loader) for _ in range(windows))] for _ in range(2)]
    reader = ShardReader(folder)
    packer = Packer(LENGTH, tokenizer.pad_id, True)
    expected = sorted(packer.batch([(reader, k)], np.zeros(1)).tokens[0].tolist() for k in range(windows))
    rows = [[batch.tokens[0].tolist() for batch in epoch] for epoch in epochs]
    assert sorted(rows[0]) == sorted(rows[1]) == expected
    assert rows[0] != rows[1]
    assert sum(batch.loss_mask.sum() for batch in epochs[0]) == sum(map(len, stream)) - 1


def test_unshuffled_is_the_order_of_the_shards(folder: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(sources=[SourceConfig(path=str(folder))], prefetch=0, shuffle=False)
    batches, _ = next(make(config, tokenizer, micro_batch_size=48))
    flat = ShardReader(folder).tokens(0, 48 * LENGTH)
    np.testing.assert_array_equal(batches[0].tokens.ravel(), flat)


def test_the_classes_of_a_head_never_change(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Whatever is allowed; a run that kept none goes on."""
    samples = Windows(config.sources, tokenizer, LENGTH)
    samples.facts |= {"labels": ["b", "c"]}

    def resume(labels: list[str] | None) -> Loader:
        state = {"samples": 48, "blend": loader.blend | {"labels": labels}}
        allowed = ["data.sources", "task.labels"]
        return Loader(samples, **settings, state=state, allowed=allowed)

    settings: dict[str, Any] = {"rank": 0, "size": 1, "global_batch_size": 48, "micro_batch_size": 1, "seed": 1}
    with Loader(samples, **settings) as loader:
        for labels in (["a", "b"], ["c", "b"]):
            with pytest.raises(
                MegalmError, match=rf"task.labels in the old order, {re.escape(json.dumps(labels))}, or"
            ):
                resume(labels)
        for kept in (None, [], ["b", "c"]):
            with resume(kept) as again:
                assert not again.restarted


@pytest.mark.parametrize("change", ["seed", "sequence_length", "shuffle", "weights", "corpus", "tokenizer"])
def test_resuming_another_blend_is_refused_by_name(
    config: DataConfig, tokenizer: Tokenizer, second_folder: Path, texts: list[str], tmp_path: Path, change: str
) -> None:
    _, state = next(make(config, tokenizer))
    sources = config.sources
    if change == "weights":
        changed = config.model_copy(update={"sources": [sources[0], sources[1].model_copy(update={"weight": 2.0})]})
    elif change == "corpus":
        changed = config.model_copy(update={"sources": [SourceConfig(path=str(second_folder), weight=3.0), sources[1]]})
    elif change == "shuffle":
        changed = config.model_copy(update={"shuffle": False})
    else:
        changed = config
    options = {"seed": {"seed": 2}, "sequence_length": {"sequence_length": 32}}.get(change, {})
    if change == "tokenizer":
        state = state | {"blend": state["blend"] | {"tokenizer": train(lambda: texts, 600).fingerprint}}
    named = {
        "seed": "run.seed",
        "sequence_length": "train.sequence_length",
        "shuffle": "data.shuffle",
        "weights": "the weights of data.sources",
        "corpus": "the content of data.sources",
        "tokenizer": "data.tokenizer",
    }
    with pytest.raises(MegalmError, match=named[change]):
        make(changed, tokenizer, state=state, **options)
    # Each may be allowed, but for the tokenizer: then the samples start anew, and the loader says why.
    if change == "tokenizer":
        with pytest.raises(MegalmError, match="restore it, start a new run$"):
            make(changed, tokenizer, state=state)
        return
    allowed = [named[change].split()[-1]]
    again = make(changed, tokenizer, state=state, allowed=allowed, **options)
    assert again.restarted == named[change]
    fresh = make(changed, tokenizer, **options)
    (ours, after), (theirs, _) = next(again), next(fresh)
    np.testing.assert_array_equal(ours[0].tokens, theirs[0].tokens)
    # From then on there is nothing to allow.
    assert make(changed, tokenizer, state=after, **options).restarted == ""


def test_refusals(config: DataConfig, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(MegalmError, match=r"global_batch_size 10 .* 3 data-parallel ranks: .* is 12"):
        make(config, tokenizer, size=3, micro_batch_size=2, global_batch_size=10)
    with pytest.raises(MegalmError, match="data.sources is empty"):
        make(DataConfig(), tokenizer)
    with pytest.raises(MegalmError, match="another tokenizer"):
        make(config, train(lambda: texts, 1000))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetching_changes_nothing(config: DataConfig, tokenizer: Tokenizer, depth: int) -> None:
    expected, state = take(make(config, tokenizer), 6)
    with make(config.model_copy(update={"prefetch": depth}), tokenizer) as loader:
        assert take(loader, 6) == (expected, state)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megalm-loader"]


def test_prefetching_reads_ahead_and_ends(config: DataConfig, tokenizer: Tokenizer) -> None:
    config = config.model_copy(update={"prefetch": 2})
    loader = make(config, tokenizer)
    assert len(loader_threads()) == 1
    next(loader)
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)
    forgotten = make(config, tokenizer)
    next(forgotten)
    del forgotten
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


def test_an_error_while_reading_ahead_reaches_the_consumer(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Packer.batch

    def broken(self: Packer, rows: Any, sample_ids: np.ndarray) -> Batch:
        if sample_ids[0] >= 96:
            raise MegalmError("the disk went away")
        return original(self, rows, sample_ids)

    monkeypatch.setattr(Packer, "batch", broken)
    with make(config.model_copy(update={"prefetch": 3}), tokenizer) as loader:
        take(loader, 2)
        for _ in range(2):
            with pytest.raises(MegalmError, match="the disk went away"):
                next(loader)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_program_that_never_closes_its_loader_ends(folder: Path, tokenizer_path: Path, interrupted: bool) -> None:
    script = f"""
import sys
from megalm.data.config import SourceConfig
from megalm.data.loader import Loader
from megalm.data.packing import Windows
from megalm.tokenizer.load import load
samples = Windows([SourceConfig(path={str(folder)!r})], load({str(tokenizer_path)!r}), 64)
loader = Loader(samples, rank=0, size=1, global_batch_size=4, micro_batch_size=4, seed=0)
next(loader)
print("read", flush=True)
try:
    while {interrupted}:
        next(loader)
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "read\n"
        if interrupted:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == (130 if interrupted else 0)
        assert process.stderr.read() == ""


@pytest.mark.parametrize(("size", "micro", "sequences"), [(1, 4, 10), (3, 4, 10), (4, 2, 64), (2, 3, 10**9), (8, 1, 1)])
def test_held_out_windows_each_once_over_all_ranks(
    second_folder: Path, tokenizer: Tokenizer, size: int, micro: int, sequences: int
) -> None:
    source = SourceConfig(path=str(second_folder))

    def batches(rank: int) -> Iterator[Batch]:
        samples = Windows([source], tokenizer, LENGTH)
        return held_out_batches(samples, rank=rank, size=size, micro_batch_size=micro, sequences=sequences)

    ranks = [list(batches(rank)) for rank in range(size)]
    assert len({len(mine) for mine in ranks}) == 1
    assert all(batch.tokens.shape == (micro, LENGTH) for mine in ranks for batch in mine)
    reader = ShardReader(second_folder)
    total = window_count(reader.tokens_total, LENGTH)
    count = min(sequences, total)
    rows = {}
    for mine in ranks:
        for batch in mine:
            for row, n in enumerate(batch.sample_ids.tolist()):
                if n < 0:
                    assert batch.loss_mask[row].sum() == 0
                else:
                    assert n not in rows
                    rows[n] = batch.tokens[row].tolist()
    assert sorted(rows) == list(range(count))
    packer = Packer(LENGTH, tokenizer.pad_id, True)
    spaced = [packer.batch([(reader, n * total // count)], np.zeros(1)).tokens[0].tolist() for n in range(count)]
    assert [rows[n] for n in range(count)] == spaced


def test_windows_refuse_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(MegalmError, match="there is no shard folder"):
        Windows([SourceConfig(path=str(tmp_path / "none"))], tokenizer, 8)
