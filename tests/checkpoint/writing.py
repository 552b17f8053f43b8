"""Checkpoints as the ranks of a layout write them, without the ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import tensors
from megalm.checkpoint.manifest import Manifest

KINDS = ("weight", "exp_avg", "exp_avg_sq")
EMPTY: dict[str, Any] = {"step": 1, "tokens": 0} | {
    name: {} for name in ("config", "layout", "data", "trainer", "optimizer", "parameters", "files", "versions")
}


@dataclass(frozen=True)
class Stretch:
    """What parallel.state.Piece is to a checkpoint."""

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    tensor_rank: int
    start: int
    tensors: dict[str, Tensor]

    @property
    def count(self) -> int:
        return self.tensors["weight"].numel()


def ranks(
    whole: dict[str, dict[str, Tensor]],
    shard_dim: Callable[[str], int | None],
    stage: Callable[[str], int],
    *,
    pipeline: int = 1,
    data: int = 1,
    tensor: int = 1,
) -> list[list[Stretch]]:
    """Each rank's stretches. whole: name -> kind -> tensor. As ZeRO does it, the flattened slices of a stage are laid
    end to end and cut into `data` parts of one length, wherever that falls."""
    everyone = []
    for at in range(pipeline):
        names = [name for name in whole if stage(name) == at]
        for data_rank in range(data):
            for tensor_rank in range(tensor):
                mine = [name for name in names if shard_dim(name) is not None or tensor_rank == 0]
                slices = {
                    name: {
                        kind: (
                            full if shard_dim(name) is None else full.chunk(tensor, shard_dim(name))[tensor_rank]
                        ).flatten()
                        for kind, full in whole[name].items()
                    }
                    for name in mine
                }
                length = sum(next(iter(kinds.values())).numel() for kinds in slices.values())
                first, last = length * data_rank // data, length * (data_rank + 1) // data
                held, place = [], 0
                for name, kinds in slices.items():
                    size = kinds["weight"].numel()
                    start, stop = max(first - place, 0), min(last - place, size)
                    place += size
                    if start < stop:
                        dim = shard_dim(name)
                        cut = {kind: flat[start:stop] for kind, flat in kinds.items()}
                        shape = tuple(whole[name]["weight"].shape)
                        held.append(Stretch(name, shape, dim, 0 if dim is None else tensor_rank, start, cut))
                everyone.append(held)
    return everyone


def save(
    directory: Path,
    everyone: list[list[Stretch]],
    layout: dict[str, int],
    *,
    dtype: str = "float32",
    **fields: Any,
) -> tuple[Path, Manifest]:
    """RUN/checkpoints/step-N of these ranks, and its manifest."""

    def write(folder: Path) -> checkpoints.Description:
        files, tables = {}, []
        for rank, stretches in enumerate(everyone):
            snapshot = tensors.Snapshot(0, pinned=False)
            snapshot.take(stretches, rank, dtype)
            files |= snapshot.write(folder, rank)
            tables.append(snapshot.table)
        return files, tensors.merge(tables)

    manifest = Manifest(**EMPTY | {"layout": layout} | fields)
    folder = checkpoints.save(directory, manifest, write, checkpoints.Alone())
    return folder, checkpoints.verify(folder, checkpoints.Alone())


def with_moments(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """name -> kind -> tensor, with moments that tell their place from the weights'."""
    return {
        name: {kind: weight.float() + 1000 * index for index, kind in enumerate(KINDS)}
        for name, weight in weights.items()
    }


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors in which every number differs from every other."""
    made, used = {}, 0.0
    for name, shape in shapes.items():
        count = int(torch.tensor(shape).prod())
        made[name] = torch.arange(used, used + count).view(shape) / 1024
        used += count
    return made
