"""The ranks of an inference: a model cut over tensor-parallel ranks, and copies of it over data-parallel ones."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from megalm.layout import Layout
from megalm.nn.layers import Layers
from megalm.parallel import device as devices

if TYPE_CHECKING:  # it imports DeepSpeed, which must not come before devices.choose()
    from megalm.parallel.groups import Groups


@dataclass(frozen=True)
class Place:
    """This rank's part in it. layers: what its model is built of."""

    device: torch.device
    layers: Layers
    groups: "Groups"

    def leave(self) -> None:
        """Leave the groups, so that the process may end without a warning. Every rank calls it."""
        from megalm.parallel import groups

        self.groups.barrier()
        groups.destroy()


def join(tensor: int, device: Literal["auto", "cpu", "cuda"]) -> Place:
    """Join the ranks that a launcher started; the data degree is what `tensor` leaves of them. Every rank calls it.

    Raises MegalmError if `tensor` does not divide the ranks, or if there is no such device.
    """
    layout = Layout.of(int(os.environ.get("WORLD_SIZE", "1")), tensor=tensor, pipeline=1)
    here = devices.local(devices.choose(device))
    from megalm.parallel import groups
    from megalm.parallel.tensor import TensorParallelLayers

    groups.start(here)
    joined = groups.create(layout)
    layers = TensorParallelLayers(joined.tensor_group, sequence_parallel=False) if tensor > 1 else Layers()
    return Place(here, layers, joined)
