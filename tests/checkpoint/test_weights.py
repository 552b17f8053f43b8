"""Weights come back whole, bit for bit, from the slices of any layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import weights
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError

# name: (stage, dimension that tensor parallelism cuts, shape)
TABLE = {
    "embedding.table.weight": (0, 0, (16, 6)),
    "blocks.0.attention.query.weight": (0, 0, (8, 6)),
    "blocks.0.attention.output.weight": (0, 1, (6, 8)),
    "blocks.1.attention_norm.weight": (1, None, (6,)),
    "blocks.1.attention.query.bias": (1, 0, (8,)),
    "head.weight": (1, 0, (16, 6)),
}


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, (_, _, shape) in TABLE.items()}


def save(directory: Path, whole: dict[str, torch.Tensor], pipeline: int, tensor: int) -> tuple[Path, Manifest]:
    """A checkpoint as the ranks of this layout write it."""
    parameters: dict[str, dict[str, object]] = {}

    def write(folder: Path) -> None:
        for stage in range(pipeline):
            for rank in range(tensor):
                slices = {}
                for name, (at, dim, _) in TABLE.items():
                    if min(at, pipeline - 1) == stage:
                        slices[name] = whole[name] if dim is None else whole[name].chunk(tensor, dim)[rank]
                        parameters.setdefault(name, weights.describe(slices[name], dim, tensor))
                weights.write(folder, stage, rank, slices.items())

    manifest = Manifest(
        step=1,
        tokens=0,
        config={},
        layout={"pipeline": pipeline, "data": 1, "tensor": tensor},
        data={},
        trainer={},
        parameters=parameters,
        files={},
        versions={},
    )
    folder = checkpoints.save(directory, manifest, write, checkpoints.Alone())
    return folder, checkpoints.verify(folder, checkpoints.Alone())


def same(folder: Path, manifest: Manifest, whole: dict[str, torch.Tensor]) -> bool:
    read = dict(weights.read(folder, manifest))
    return read.keys() == whole.keys() and all(
        read[name].dtype == whole[name].dtype and torch.equal(read[name], whole[name]) for name in whole
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_read_returns_what_the_ranks_wrote(tmp_path: Path, dtype: torch.dtype, pipeline: int, tensor: int) -> None:
    whole = tensors(dtype)
    folder, manifest = save(tmp_path, whole, pipeline, tensor)
    assert same(folder, manifest, whole)
    assert [name for name, _ in weights.read(folder, manifest)] == list(manifest.parameters) == list(whole)
    assert {name: tuple(entry["shape"]) for name, entry in manifest.parameters.items()} == {
        name: shape for name, (_, _, shape) in TABLE.items()
    }
    assert sorted(manifest.files) == sorted(weights.file_names(manifest))


def test_a_file_is_plain_safetensors_of_one_rank(tmp_path: Path) -> None:
    whole = tensors(torch.float32)
    folder, _ = save(tmp_path, whole, 2, 2)
    theirs = load_file(folder / "weights-stage-001-tensor-001.safetensors")
    assert theirs.keys() == {name for name, (stage, _, _) in TABLE.items() if stage == 1}
    assert torch.equal(theirs["head.weight"], whole["head.weight"][8:])


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def test_swapped_shards_are_caught(tmp_path: Path) -> None:
    """Negative control: the comparison sees slices in the wrong order, and so do the manifest's checksums."""
    whole = tensors(torch.float32)
    folder, manifest = save(tmp_path, whole, 2, 2)
    swap(folder / weights.file_name(0, 0), folder / weights.file_name(0, 1))
    assert not same(folder, manifest, whole)
    with pytest.raises(MegalmError, match=r"weights-stage-000-tensor-000.safetensors was altered"):
        checkpoints.verify(folder, checkpoints.Alone())


def test_a_wrong_dimension_is_caught(tmp_path: Path) -> None:
    whole = tensors(torch.float32)
    folder, manifest = save(tmp_path, whole, 1, 2)
    entry = manifest.parameters["blocks.0.attention.output.weight"]
    wrong = replace(manifest, parameters={"blocks.0.attention.output.weight": entry | {"shard_dim": 0}})
    with pytest.raises(AssertionError, match="blocks.0.attention.output.weight"):
        dict(weights.read(folder, wrong))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder, manifest = save(tmp_path, tensors(torch.float32), 2, 2)
    (folder / weights.file_name(1, 1)).unlink()
    with pytest.raises(MegalmError, match="weights-stage-001-tensor-001.safetensors is missing"):
        dict(weights.read(folder, manifest))


def test_writing_takes_no_hold_of_the_parameters(tmp_path: Path) -> None:
    """Slices that are views of one buffer, as DeepSpeed's are, are written apart."""
    buffer = torch.arange(24.0)
    views = {"a": buffer[:12].view(3, 4), "b": buffer[12:].view(4, 3).t()}
    weights.write(tmp_path, 0, 0, views.items())
    theirs = load_file(tmp_path / weights.file_name(0, 0))
    assert all(torch.equal(theirs[name], view) for name, view in views.items())
