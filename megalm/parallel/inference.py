"""The ranks of an inference: a model cut over tensor-parallel ranks and pipeline stages, and copies of it over
data-parallel ones."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.errors import MegalmError
from megalm.layout import Layout
from megalm.nn.layers import Layers
from megalm.parallel import device as devices

if TYPE_CHECKING:  # it imports DeepSpeed, which must not come before devices.choose()
    from megalm.parallel.groups import Groups


@dataclass(frozen=True)
class Pipe:
    """The pipeline stages of this rank's copy of the model, of which each knows the shapes of what it gets.

    Stages send to the next one only, one message at a time: rows are not cut into pieces that could overlap.
    """

    groups: "Groups"

    @property
    def stage(self) -> int:
        return self.groups.stage

    @property
    def stages(self) -> int:
        return self.groups.layout.pipeline

    def receive(self, hidden: Tensor) -> None:
        """Fill `hidden` with what the stage before this one sends."""
        dist.recv(hidden, self._rank(self.stage - 1), group=self.groups.pipeline_group)

    def send(self, hidden: Tensor) -> None:
        """Send to the stage behind this one."""
        dist.send(hidden.contiguous(), self._rank(self.stage + 1), group=self.groups.pipeline_group)

    def share(self, logits: Tensor) -> None:
        """Fill `logits` with the last stage's, to the bit. Every stage calls it."""
        dist.broadcast(logits, self._rank(self.stages - 1), group=self.groups.pipeline_group)

    def _rank(self, stage: int) -> int:
        """The rank that has this one's part in another stage."""
        return self.groups.layout.rank(stage, self.groups.data_rank, self.groups.tensor_rank)


@dataclass(frozen=True)
class Place:
    """This rank's part in it. layers: what its model is built of. pipe: its pipeline, if that has several stages."""

    device: torch.device
    layers: Layers
    pipe: Pipe | None
    groups: "Groups"

    def leave(self) -> None:
        """Leave the groups, so that the process may end without a warning. Every rank calls it."""
        from megalm.parallel import groups

        self.groups.barrier()
        groups.destroy()


def join(device: Literal["auto", "cpu", "cuda"], *, tensor: int = 1, pipeline: int = 1) -> Place:
    """Join the ranks that a launcher started; the data degree is what the others leave of them. Every rank calls it.

    Raises MegalmError if the degrees do not fit the ranks, or if there is no such device.
    """
    layout = _layout(tensor, pipeline)
    here = devices.local(devices.choose(device))
    from megalm.parallel import groups

    groups.start(here)
    joined = groups.create(layout)
    return Place(here, joined.layers(), Pipe(joined) if pipeline > 1 else None, joined)


def _layout(tensor: int, pipeline: int) -> Layout:
    """The layout of all ranks."""
    try:
        for name, degree in (("tensor", tensor), ("pipeline", pipeline)):
            if degree < 1:
                raise MegalmError(f"the {name} degree {degree} is not 1 or more: 1 cuts nothing")
        return Layout.of(int(os.environ.get("WORLD_SIZE", "1")), tensor=tensor, pipeline=pipeline)
    except MegalmError as error:
        error.echo = os.environ.get("RANK", "0") != "0"  # every rank finds the same
        raise
