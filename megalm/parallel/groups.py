"""Process groups: the only file that touches torch.distributed's start-up and megatron-core's parallel_state."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch.distributed import distributed_c10d

from megalm.errors import MegalmError, reason
from megalm.layout import Layout
from megalm.nn.layers import Layers

T = TypeVar("T")


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints its inner life to stdout while it builds; a run's log has its own words for it."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@dataclass(frozen=True)
class Groups:
    """This rank's place in the layout and its process groups."""

    layout: Layout
    rank: int
    grid: PipelineParallelGrid
    tensor_group: dist.ProcessGroup
    host_group: dist.ProcessGroup | None
    """All ranks, over host memory; None where the default group is that."""

    @property
    def stage(self) -> int:
        return self.layout.coordinates(self.rank)[0]

    @property
    def data_rank(self) -> int:
        return self.layout.coordinates(self.rank)[1]

    @property
    def data_size(self) -> int:
        return self.layout.data

    @property
    def tensor_rank(self) -> int:
        return self.layout.coordinates(self.rank)[2]

    @property
    def size(self) -> int:
        return self.layout.world_size

    def layers(self, *, sequence_parallel: bool = False) -> Layers:
        """The factory of this rank's layers."""
        if self.layout.tensor == 1:
            return Layers()
        from megalm.parallel.tensor import TensorParallelLayers  # with megatron-core: see _megatron_group()

        return TensorParallelLayers(self.tensor_group, sequence_parallel=sequence_parallel)

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, on every rank, in rank order."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def gather_to_main(self, item: Any) -> list[Any]:
        """`item` of every rank in rank order, on rank 0; nothing on the others."""
        items: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(item, items, dst=0)
        return items or []

    def decide(self, question: Callable[[], T]) -> T:
        """Rank 0's answer on every rank, so that none acts on another view of the disk; or its error on all, which is a
        MegalmError on the others."""
        answer: list[Any] = [None, ""]
        raised = None
        if self.rank == 0:
            try:
                answer = [question(), ""]
            except Exception as error:
                raised, answer = error, [None, reason(error)]
        dist.broadcast_object_list(answer, src=0)
        if raised:
            raise raised
        if answer[1]:
            raise MegalmError(answer[1], echo=True)
        return answer[0]

    def maximum(self, value: float, *, idle: bool = False) -> float:
        """The largest `value` of any rank, on every rank. No value may be not a number.

        GPUs are not waited for. idle: they have nothing to do anyhow, and their links are faster.
        """
        over_gpus = idle and self.host_group is not None
        tensor = torch.tensor(value, dtype=torch.float64, device="cuda" if over_gpus else "cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=None if over_gpus else self.host_group)
        return tensor.item()

    def beside(self) -> "Beside":
        """A group of all ranks for another thread, whose messages never mix with this thread's. All ranks call it."""
        # A disk may keep one rank waiting for long; that of a rank that died is noticed at once.
        return Beside(self.rank, self.size, dist.new_group(backend="gloo", timeout=timedelta(days=1)))

    @property
    def topology(self) -> PipeModelDataParallelTopology:
        return self.grid.topology()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.grid.get_data_parallel_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The stages of one copy of the model: same data and tensor coordinates."""
        return self.grid.get_pipe_parallel_group()

    @property
    def model_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one copy of the model: same data coordinate."""
        return self.grid.get_model_parallel_group()


@dataclass(frozen=True)
class Beside:
    """All ranks, in a process group of its own over host memory."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def barrier(self) -> None:
        dist.barrier(self.group)

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, on every rank, in rank order."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items


def world_size() -> int:
    """Ranks that the launcher started, read from the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_FILES = 65_536
"""Open files that a rank of thousands may need."""
WATCHED = timedelta(days=1)
"""How long a rank waits for others whose launcher ends ranks that get nowhere. That must come first: it knows where all
of them are, and of those that only waited, NCCL would blame one."""


ALONE = timedelta(minutes=30)
"""The same where nobody watches."""


def start(device: torch.device, patience: timedelta = ALONE) -> None:
    """Join the other ranks; without a launcher, start a group of one. patience: of every group."""
    _raise_limit_of_files()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    # Port 0 lets a group of one take any free port, so that runs beside each other never collide.
    os.environ.setdefault("MASTER_PORT", "0")
    deepspeed.utils.logger.setLevel("ERROR")
    # On a CPU DeepSpeed would first compile an all-reduce that only its inference calls. A process that is killed
    # meanwhile leaves a lock behind for which every later one waits for good.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet():
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False, timeout=patience
        )


def _raise_limit_of_files() -> None:
    """Each group of gloo takes a socket for every rank, and a usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems have a limit of their own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def create(layout: Layout) -> Groups:
    """Build every group of the layout. All ranks call it, once."""
    rank = dist.get_rank()
    topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data)
    with quiet():
        grid = PipelineParallelGrid(topology=topology)
    tensor_group = _megatron_group(layout) if layout.tensor > 1 else grid.get_slice_parallel_group()
    host_group = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None
    _share_patience()
    return Groups(layout, rank, grid, tensor_group, host_group)


def _share_patience() -> None:
    """Let every group wait as long as the first one does: by themselves, those of NCCL give up after ten minutes."""
    main, *others = distributed_c10d._world.pg_map
    device = torch.device("cuda" if dist.get_backend(main) == "nccl" else "cpu")
    for group in others:
        distributed_c10d._set_pg_timeout(main._get_backend(device).options._timeout, group)


def _megatron_group(layout: Layout) -> dist.ProcessGroup:
    """This rank's tensor-parallel group, and megatron-core made ready for the layers that use it."""
    from megatron.core import parallel_state  # which takes as long to import as all else, so only who needs it does

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        create_gloo_process_groups=False,
    )
    rank = dist.get_rank()
    ours = layout.coordinates(rank)
    theirs = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    assert ours == theirs, f"rank {rank} is {ours} in layout.py but {theirs} in megatron-core"
    return parallel_state.get_tensor_model_parallel_group()


def destroy() -> None:
    """Leave every group, so that the process may build another layout or end without a warning."""
    if megatron := sys.modules.get("megatron.core.parallel_state"):
        megatron.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
