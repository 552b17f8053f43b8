"""Initial weights that no layout can change.

Every tensor is drawn from its own counter-based stream, keyed by the seed and the parameter's full name, and cut
to the slice this rank holds. Parameters say what they are through `declare`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """How a parameter starts, and where tensor parallelism cuts it.

    std: normal with this deviation; None: filled with `value`. shard_dim: dimension along which the full tensor is
    the concatenation of the ranks' slices; None: every rank holds it whole. drawn_rows: rows beyond are zero.
    matrix: a filled tensor that is a matrix all the same. decay: whether weight decay applies.
    """

    std: float | None = None
    value: float = 0.0
    shard_dim: int | None = None
    drawn_rows: int | None = None
    matrix: bool = False

    @property
    def decay(self) -> bool:
        return self.std is not None or self.matrix


def declare(parameter: Tensor, spec: Spec) -> None:
    """Attach `spec`; every parameter of a model carries one."""
    parameter.spec = spec  # type: ignore[attr-defined]


def spec_of(parameter: Tensor) -> Spec:
    spec = getattr(parameter, "spec", None)
    assert isinstance(spec, Spec), "every parameter is declared where it is made"
    return spec


def draw(name: str, shape: tuple[int, ...], spec: Spec, seed: int) -> Tensor:
    """The full tensor `name` at step 0, fp32 on the CPU."""
    if spec.std is None:
        return torch.full(shape, spec.value, device="cpu")
    rows = spec.drawn_rows or shape[0]
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    stream = np.random.Generator(np.random.Philox(key=key))
    full = torch.zeros(shape, dtype=torch.float32, device="cpu")
    drawn = full[:rows]
    stream.standard_normal(out=drawn.numpy(), dtype=np.float32)  # in place: tables of large models are many GB
    drawn.mul_(spec.std)
    return full


@torch.no_grad()
def initialize(module: nn.Module, name: str, seed: int | None, tensor_rank: int = 0, tensor_size: int = 1) -> None:
    """Fill the parameters of layer `name` with this rank's slices of the drawn tensors.

    seed None: a checkpoint is about to fill them; what it forgets is not a number, and cannot pass unseen.
    """
    for suffix, parameter in module.named_parameters():
        if seed is None:
            parameter.fill_(torch.nan)
            continue
        spec = spec_of(parameter)
        shape = list(parameter.shape)
        if spec.shard_dim is None:
            parameter.copy_(draw(f"{name}.{suffix}", tuple(shape), spec, seed))
            continue
        shape[spec.shard_dim] *= tensor_size
        full = draw(f"{name}.{suffix}", tuple(shape), spec, seed)
        parameter.copy_(full.chunk(tensor_size, dim=spec.shard_dim)[tensor_rank])
