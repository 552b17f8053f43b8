"""Whatever layout wrote a checkpoint, every rank of every other reads just what it holds, bit for bit."""

import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import tensors
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.tensors import Reader
from megalm.errors import MegalmError
from tests.checkpoint import writing

# name: (stage, dimension that tensor parallelism cuts, shape)
TABLE: dict[str, tuple[int, int | None, tuple[int, ...]]] = {
    "embedding.table.weight": (0, 0, (16, 6)),
    "blocks.0.attention.query.weight": (0, 0, (8, 6)),
    "blocks.0.attention.output.weight": (0, 1, (6, 8)),
    "blocks.1.attention_norm.weight": (1, None, (7,)),
    "blocks.1.attention.query.bias": (1, 0, (8,)),
    "head.weight": (1, 0, (16, 6)),
}
WHOLE = writing.with_moments(writing.numbered({name: shape for name, (_, _, shape) in TABLE.items()}))


def save(directory: Path, pipeline: int, data: int, tensor: int, dtype: str = "float32") -> tuple[Path, Manifest]:
    everyone = writing.ranks(
        WHOLE,
        lambda name: TABLE[name][1],
        lambda name: min(TABLE[name][0], pipeline - 1),
        pipeline=pipeline,
        data=data,
        tensor=tensor,
    )
    return writing.save(directory, everyone, {"pipeline": pipeline, "data": data, "tensor": tensor}, dtype=dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], tuple[Path, Manifest]]:
    """A checkpoint of every layout of a few ranks."""
    layouts = [(p, d, t) for p in (1, 2) for d in (1, 2, 3, 5) for t in (1, 2, 4)]
    folder = tmp_path_factory.mktemp("saved")
    return {each: save(folder / "-".join(map(str, each)), *each) for each in layouts}


def test_whole_tensors(saved: Any) -> None:
    for folder, manifest in saved.values():
        with Reader(folder, manifest) as reader:
            for name, kinds in WHOLE.items():
                for kind, tensor in kinds.items():
                    assert torch.equal(reader.whole(name, kind), tensor)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_stretch_of_any_slice(saved: Any, draw: Any) -> None:
    folder, manifest = saved[draw.draw(st.sampled_from(sorted(saved)))]
    name, kind = draw.draw(st.sampled_from(sorted(WHOLE))), draw.draw(st.sampled_from(writing.KINDS))
    size = draw.draw(st.sampled_from((1, 2, 4, 8)))
    dim = TABLE[name][1]
    if dim is None or WHOLE[name][kind].shape[dim] % size:
        dim, size = None, 1
    rank = draw.draw(st.integers(0, size - 1))
    whole = WHOLE[name][kind]
    flat = (whole if dim is None else whole.chunk(size, dim)[rank]).flatten()
    start = draw.draw(st.integers(0, len(flat) - 1))
    count = draw.draw(st.integers(1, len(flat) - start))
    with Reader(folder, manifest) as reader:
        assert torch.equal(reader.stretch(name, kind, dim, rank, size, start, count), flat[start : start + count])


def test_what_one_layout_keeps_whole_another_may_cut(tmp_path: Path) -> None:
    """Fewer key-value heads than tensor ranks: whole on every rank there, cut elsewhere."""
    weight = {"key.weight": {"weight": torch.arange(24.0).view(4, 6)}}
    whole = writing.ranks(weight, lambda name: None, lambda name: 0, data=2, tensor=4)
    folder, manifest = writing.save(tmp_path / "a", whole, {"pipeline": 1, "data": 2, "tensor": 4})
    with Reader(folder, manifest) as reader:
        assert torch.equal(reader.stretch("key.weight", "weight", 0, 1, 2, 3, 7), torch.arange(15.0, 22.0))
    cut = writing.ranks(weight, lambda name: 0, lambda name: 0, tensor=2)
    folder, manifest = writing.save(tmp_path / "b", cut, {"pipeline": 1, "data": 1, "tensor": 2})
    with Reader(folder, manifest) as reader:
        assert torch.equal(reader.stretch("key.weight", "weight", None, 0, 4, 9, 6), torch.arange(9.0, 15.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_as_in_the_forward_pass(tmp_path: Path, dtype: str) -> None:
    folder, manifest = save(tmp_path, 2, 3, 2, dtype)
    read = dict(tensors.read_weights(folder, manifest))
    assert read.keys() == WHOLE.keys()
    for name, kinds in WHOLE.items():
        assert torch.equal(read[name], kinds["weight"].to(getattr(torch, dtype)))


def test_a_file_is_plain_safetensors_of_one_rank(tmp_path: Path) -> None:
    folder, _ = save(tmp_path, 2, 1, 2)
    weights, moments = (load_file(folder / tensors.file_name(3, kind)) for kind in ("weight", "exp_avg"))
    assert torch.equal(weights["head.weight/weight/1/0"], WHOLE["head.weight"]["weight"][8:].flatten())
    assert torch.equal(moments["head.weight/exp_avg_sq/1/0"], WHOLE["head.weight"]["exp_avg_sq"][8:].flatten())
    assert (len(weights), len(moments)) == (2, 4), "a bias and the head; the norm is rank 2's to write"


def test_moments_that_were_not_there_yet_are_zero(tmp_path: Path) -> None:
    everyone = writing.ranks({"a": {"weight": torch.ones(4)}}, lambda name: None, lambda name: 0)
    folder, manifest = writing.save(tmp_path, everyone, {"pipeline": 1, "data": 1, "tensor": 1})
    with Reader(folder, manifest) as reader:
        assert torch.equal(reader.whole("a", "exp_avg"), torch.zeros(4))


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_swapped_shards_are_caught(tmp_path: Path) -> None:
    """Negative control: a stretch in another's place is not read, and the manifest's checksums see it first."""
    folder, manifest = save(tmp_path, 2, 1, 2)
    swap(folder / tensors.file_name(0), folder / tensors.file_name(1))
    with pytest.raises(MegalmError, match=r"weights-rank-00000.safetensors (was altered|holds)"):
        checkpoints.verify(folder, checkpoints.Alone())
    with pytest.raises(Exception, match="blocks.0|embedding"), Reader(folder, manifest) as reader:
        reader.whole("embedding.table.weight")


def test_a_missing_piece_is_never_saved(tmp_path: Path) -> None:
    everyone = writing.ranks(WHOLE, lambda name: TABLE[name][1], lambda name: 0, data=2)
    with pytest.raises(AssertionError, match="numbers were saved"):
        writing.save(tmp_path, everyone[:1], {"pipeline": 1, "data": 2, "tensor": 1})


def test_numbers_that_nobody_saved_are_not_made_up(tmp_path: Path) -> None:
    folder, manifest = save(tmp_path, 1, 2, 1)
    entry = manifest.parameters["head.weight"]
    larger = replace(manifest, parameters={"head.weight": entry | {"shape": [20, 6]}})
    with pytest.raises(AssertionError, match="of 120 numbers asked for"), Reader(folder, larger) as reader:
        reader.whole("head.weight")


def test_numbers_that_were_saved_twice_are_noticed(tmp_path: Path) -> None:
    [mine] = writing.ranks({"a": {"weight": torch.arange(8.0)}}, lambda name: None, lambda name: 0)
    [whole] = mine
    first, again = (replace(whole, start=start, tensors={"weight": torch.zeros(4)}) for start in (0, 2))
    with pytest.raises(AssertionError, match="saved twice or never"):
        writing.save(tmp_path, [[first, again]], {"pipeline": 1, "data": 1, "tensor": 1})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder, manifest = save(tmp_path, 2, 1, 2)
    (folder / tensors.file_name(3)).unlink()
    with pytest.raises(MegalmError, match="weights-rank-00003.safetensors cannot be read"):
        dict(tensors.read_weights(folder, manifest))


@pytest.fixture
def few_files() -> Iterator[int]:
    """A limit on open files that leaves this process about as many as it has."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2 * max(map(int, os.listdir("/proc/self/fd"))) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, old[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_more_files_than_may_be_open(tmp_path: Path, few_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    weights = writing.numbered({f"{number}": (few_files,) for number in range(8)})
    whole = {name: {"weight": weight} for name, weight in weights.items()}
    everyone = writing.ranks(whole, lambda name: 0, lambda name: 0, data=few_files)
    folder, manifest = writing.save(tmp_path, everyone, {"pipeline": 1, "data": few_files, "tensor": 1})
    assert len(tensors.weight_files(manifest)) == few_files
    with Reader(folder, manifest) as reader, ThreadPoolExecutor(4) as pool:
        for name, read in zip(3 * list(weights), pool.map(reader.whole, 3 * list(weights)), strict=True):
            assert torch.equal(read, weights[name])
    assert not any(str(folder) in os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd"))


def test_a_file_that_is_let_go_is_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread that has it, while others open theirs."""
    monkeypatch.setattr(tensors, "_MOST_OPEN", 1)
    folder, manifest = save(tmp_path, 1, 3, 1)
    with Reader(folder, manifest) as reader:
        held = reader._file(0, "weight")
        reader.whole("head.weight")
        assert reader._file(0, "weight") is not held
        assert torch.equal(held.numbers("embedding.table.weight/weight/0/0", 0, 6), torch.arange(6) / 1024)


def test_a_limit_on_files_is_no_damage(tmp_path: Path, few_files: int) -> None:
    folder, manifest = save(tmp_path, 1, 1, 1)
    held: list[int] = []
    try:
        while True:
            held.append(os.open(folder, os.O_RDONLY))
    except OSError:
        with (
            pytest.raises(MegalmError, match="too many files are open, raise the limit"),
            Reader(folder, manifest) as reader,
        ):
            reader.whole("head.weight")
    finally:
        for each in held:
            os.close(each)


def test_a_snapshot_stays_while_training_goes_on(tmp_path: Path) -> None:
    """What is written is what was there, and the memory serves the next save."""
    values = torch.arange(8.0)
    stretch = writing.Stretch("a", (8,), None, 0, 0, {"weight": values})
    snapshot = tensors.Snapshot(8, pinned=False)
    snapshot.touch()
    for number in range(2):
        before = values.clone()
        snapshot.take([stretch], 0, "float32")
        values += 1
        [(name, entry)] = snapshot.write(tmp_path, number).items()
        assert torch.equal(load_file(tmp_path / name)["a/weight/0/0"], before)
        assert entry["bytes"] == (tmp_path / name).stat().st_size
