"""A model's weights as they lie in a checkpoint: slices in safetensors files, whole again one tensor at a time."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError


def file_name(stage: int, tensor_rank: int) -> str:
    return f"weights-stage-{stage:03d}-tensor-{tensor_rank:03d}.safetensors"


def file_names(manifest: Manifest) -> list[str]:
    """Every file of a checkpoint that read() opens."""
    layout = manifest.layout
    return [file_name(stage, rank) for stage in range(layout["pipeline"]) for rank in range(layout["tensor"])]


def write(folder: Path, stage: int, tensor_rank: int, slices: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write one rank's slices, under their full names."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in slices}
    save_file(tensors, folder / file_name(stage, tensor_rank))


def describe(tensor: torch.Tensor, shard_dim: int | None, tensor_size: int) -> dict[str, Any]:
    """The manifest's entry for a weight of which `tensor` is a slice."""
    shape = list(tensor.shape)
    if shard_dim is not None:
        shape[shard_dim] *= tensor_size
    return {"shape": shape, "shard_dim": shard_dim, "dtype": str(tensor.dtype).removeprefix("torch.")}


def read(folder: Path, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """(full name, whole tensor) of every weight, in the manifest's order; memory is that of one tensor."""
    with ExitStack() as stack:
        files: dict[tuple[int, int], Any] = {}
        where: dict[str, int] = {}
        for stage in range(manifest.layout["pipeline"]):
            for rank in range(manifest.layout["tensor"]):
                path = folder / file_name(stage, rank)
                if not path.exists():
                    raise MegalmError(f"{path} is missing: the checkpoint is damaged, choose another one of the run")
                files[stage, rank] = stack.enter_context(safe_open(path, framework="pt"))
            where |= dict.fromkeys(files[stage, 0].keys(), stage)
        for name, entry in manifest.parameters.items():
            stage, dim = where[name], entry["shard_dim"]
            ranks = range(manifest.layout["tensor"]) if dim is not None else range(1)
            parts = [files[stage, rank].get_tensor(name) for rank in ranks]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
            assert list(whole.shape) == entry["shape"], f"{name} is {list(whole.shape)}, not {entry['shape']}"
            yield name, whole
