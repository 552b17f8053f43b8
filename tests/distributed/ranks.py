"""Run a function on several gloo ranks.

Ranks are forked from one server that has imported torch, deepspeed and megatron-core already, so each starts in
milliseconds and in a clean state: imports would otherwise dominate every distributed test. `run_ranks` takes fresh
ranks; `Pool` keeps its ranks for one call after the other, each of which starts and leaves its own process groups.
"""

import contextlib
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

from tests.distributed.shared_memory import Mesh

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


CALLS = 32
"""Of a rank, times the ranks of its pool, after which the pool should make way for a new one."""


class RankFailed(Exception):
    """A rank raised; the message is its traceback."""


class Pool:
    """`size` ranks that wait for something to do.

    Calls share what they change in their processes: a call that patches code needs a pool of its own (run_ranks).
    """

    def __init__(self, size: int, shared_memory: bool = False) -> None:
        """shared_memory: ranks talk over a mesh, not over gloo."""
        self.size = size
        self._calls = 0
        self._processes, self._pipes = [], []
        self._mesh = Mesh(_CONTEXT, size) if shared_memory else None
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, size, theirs, self._mesh), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    @property
    def usable(self) -> bool:
        """False after a rank raised, and when DeepSpeed has left so much behind that new ranks are better: of ZeRO 3
        and DualPipeV it keeps 16 threads and 50 file descriptors a call."""
        return bool(self._processes) and self._calls * self.size < CALLS

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """function(*args) on every rank; its results in rank order. The first rank that raises ends the pool."""
        self._calls += 1
        # Where ranks meet. It is kept by this process, which takes whatever port is free: between looking for one and
        # taking it in rank 0, another process would take it now and then.
        self._meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for pipe in self._pipes:
                pipe.send((self._meeting.port, function, args))
            return self._results(timeout)
        except BaseException:
            self.close()
            raise

    def _results(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                raise RankFailed(f"ranks {sorted(waiting.values())} of {self.size} said nothing for {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[index]
                try:
                    good, result = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    raise RankFailed(f"rank {rank} of {self.size} died without a word") from None
                if not good:
                    raise RankFailed(result)
                results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks, whatever they are doing."""
        for process in self._processes:
            with contextlib.suppress(Exception):
                process.kill()
                process.join(10)
        for pipe in self._pipes:
            pipe.close()
        if self._mesh:
            self._mesh.close()
        self._processes, self._pipes, self._mesh = [], [], None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """function(*args) on `size` fresh ranks; its results in rank order. The first rank that raises ends all of them."""
    with Pool(size) as pool:
        return pool.run(function, *args, timeout=timeout)


def _serve(rank: int, size: int, pipe: Connection, mesh: Mesh | None) -> None:
    """The life of a rank."""
    if mesh:
        mesh.enter(rank)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the meeting place is there already
    }
    try:
        while True:
            port, function, args = pipe.recv()
            os.environ["MASTER_PORT"] = str(port)
            if mesh:
                mesh.start()
            pipe.send((True, function(*args)))
            _leave()
    except EOFError:  # whoever wanted something of it is gone
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))
    finally:
        pipe.close()
        # Skip the destructors of process groups whose peers may be gone.
        os._exit(0)


def _leave() -> None:
    """Forget every process group, DeepSpeed's references to them and the engine, as if nothing had been run."""
    if "torch.distributed" in sys.modules:
        import deepspeed

        if deepspeed.comm.is_initialized():
            if megatron := sys.modules.get("megatron.core.parallel_state"):
                megatron.destroy_model_parallel()
            deepspeed.comm.destroy_process_group()
    gc.collect()  # an engine and its optimizer hold each other
