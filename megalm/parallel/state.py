"""The training state inside DeepSpeed's optimizers: which numbers of which tensor this rank holds, and where.

ZeRO keeps fp32 weights and moments in flat buffers that are cut over data-parallel ranks wherever the cut falls. A
Piece says which stretch of which tensor such a stretch of a buffer is; its tensors are views, to read or to fill.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalm.nn.init import spec_of
from megalm.optim import adamw
from megalm.parallel.groups import Groups

WEIGHT = "weight"
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves in DeepSpeed's DynamicLossScaler; the rest of it are settings."""


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter's training state.

    name: of the parameter, whole. shape: of the whole tensor. shard_dim: along which tensor parallelism cuts it, or
    None. tensor_rank: whose slice the stretch lies in (0 if it is not cut). start: of the stretch in the flattened
    slice. tensors: [count], fp32 `weight` and moments; or `weight` alone if it is not trained, in the forward pass's
    precision.
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    tensor_rank: int
    start: int
    tensors: dict[str, Tensor]

    @property
    def count(self) -> int:
        return self.tensors[WEIGHT].numel()

    def stretch(self, start: int, stop: int) -> "Piece":
        """The numbers start..stop of this piece."""
        cut = {kind: tensor[start:stop] for kind, tensor in self.tensors.items()}
        return Piece(self.name, self.shape, self.shard_dim, self.tensor_rank, self.start + start, cut)


def describe(name: str, parameter: nn.Parameter, groups: Groups, start: int, tensors: dict[str, Tensor]) -> Piece:
    spec = spec_of(parameter)
    shape = list(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO 3 a parameter's own is that of nothing
    if spec.shard_dim is not None:
        shape[spec.shard_dim] *= groups.layout.tensor
    tensor_rank = 0 if spec.shard_dim is None else groups.tensor_rank
    return Piece(name, tuple(shape), spec.shard_dim, tensor_rank, start, tensors)


class State:
    """The fp32 weights and moments of one DeepSpeed engine."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._stage: int = engine.zero_optimization_stage()
        self._basic: torch.optim.Optimizer = engine.basic_optimizer if self._stage == 0 else engine.optimizer.optimizer

    @property
    def updates(self) -> int:
        """Updates the optimizer has made, as it counts them for its bias correction."""
        return adamw.updates(self._basic)

    def prepare(self, updates: int) -> None:
        """Make moments, zero if there are none yet, and set the count of updates. Optimizers make theirs at their
        first step, which a loaded run has behind it."""
        adamw.prepare(self._basic, self._buffers(), updates)

    def copies(self, parameter: nn.Parameter) -> bool:
        """Whether every data-parallel rank holds all of what there is of a parameter."""
        return self._stage == 0 or (self._stage < 3 and not parameter.requires_grad)

    def stretch(self, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]] | None:
        """(start in the flattened parameter, {kind: view}) of what this rank holds of a parameter.

        One that is not trained has no fp32 copy and no moments: it is the forward pass's, in its precision.
        """
        if not parameter.requires_grad:
            if self._stage < 3:
                return 0, {WEIGHT: parameter.data.view(-1)}
            kept: Any = parameter
            start, whole = _share(parameter)
            count = min(whole, kept.ds_numel - start)
            return (start, {WEIGHT: kept.ds_tensor.data.view(-1)[:count]}) if count > 0 else None
        if self._stage == 3:
            buffer, place, count = self._partition(parameter)
            cut: Any = parameter  # DeepSpeed's attributes of it
            start, _ = _share(parameter)
            count = min(count, cut.ds_numel - start)  # the last rank's partition ends in padding
            return (start, self._views(buffer, place, count)) if count > 0 else None
        if self._stage:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            # Not its optim_fragment, which DeepSpeed leaves empty for every group of parameters but the first.
            [buffer] = self._basic.param_groups[mapping.param_group_index]["params"]
            place = mapping.hp_fragment_address
            return mapping.lp_fragment_address.start, self._views(buffer, place.start, place.numel)
        return 0, self._views(parameter, 0, parameter.numel())

    def publish(self) -> None:
        """Give the weights of the forward pass the values of the fp32 ones. All ranks call it."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer._partition_all_parameters()
            halves, wholes = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
            for group, (half, whole) in enumerate(zip(halves, wholes, strict=True)):
                half.data.copy_(whole.data)
                optimizer._unflatten_partitioned_parameters(group)
            if kept := optimizer.persistent_parameters:  # small ones stay gathered between steps
                kept[0].partition(kept)
                kept[0].all_gather(kept)

    def scale(self) -> dict[str, Any]:
        """The state of fp16's loss scale; nothing in other precisions."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {name: getattr(scaler, name) for name in _SCALE}

    def set_scale(self, state: dict[str, Any]) -> None:
        """Take back what scale() returned."""
        if self.scale():
            vars(self._engine.optimizer.loss_scaler).update(state)

    def _buffers(self) -> list[Tensor]:
        """The tensors that the optimizer updates."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._basic.param_groups for parameter in group["params"]]

    def _partition(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        optimizer = self._engine.optimizer
        group, place, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer.fp32_partitioned_groups_flat[group], place, count

    def _views(self, buffer: Tensor, place: int, count: int) -> dict[str, Tensor]:
        moments = {kind: self._basic.state.get(buffer, {}).get(kind) for kind in adamw.MOMENTS}
        found = {WEIGHT: buffer.data, **{kind: moment for kind, moment in moments.items() if moment is not None}}
        assert len(found) in (1, 1 + len(adamw.MOMENTS))
        return {kind: tensor.view(-1)[place : place + count] for kind, tensor in found.items()}


def _share(parameter: nn.Parameter) -> tuple[int, int]:
    """(start in the flattened parameter, numbers) of this rank's partition under ZeRO 3, padding included."""
    cut: Any = parameter  # DeepSpeed's attributes of it
    numbers = cut.ds_tensor.ds_numel
    return numbers * torch.distributed.get_rank(cut.ds_process_group), numbers


def pieces(state: State, named: Iterator[tuple[str, nn.Parameter]], groups: Groups, *, owned: bool) -> Iterator[Piece]:
    """What this rank holds of the `named` parameters. owned: of what several ranks hold, each only its share."""
    for name, parameter in named:
        if owned and spec_of(parameter).shard_dim is None and groups.tensor_rank > 0:
            continue
        held = state.stretch(parameter)
        if held is None:
            continue
        piece = describe(name, parameter, groups, *held)
        if owned and state.copies(parameter):
            start, stop = (
                piece.count * rank // groups.layout.data for rank in (groups.data_rank, groups.data_rank + 1)
            )
            piece = piece.stretch(start, stop)
        if piece.count:
            yield piece
