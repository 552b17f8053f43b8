"""Run a function on several gloo ranks.

Ranks are forked from one server that has imported torch, deepspeed and megatron-core already, so each starts in
milliseconds and in a clean state: imports would otherwise dominate every distributed test.
"""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


class RankFailed(Exception):
    """A rank raised; the message is its traceback."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(rank: int, size: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))
    finally:
        pipe.close()
        # Skip the destructors of process groups whose peers may be gone.
        os._exit(0)


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """function(*args) on `size` ranks; its results in rank order. The first rank that raises ends all of them."""
    port = _free_port()
    processes, pipes = [], []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank_main, args=(rank, size, port, theirs, function, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    results: dict[int, Any] = {}
    try:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                raise RankFailed(f"ranks {sorted(waiting.values())} of {size} said nothing for {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[index]
                try:
                    good, result = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise RankFailed(f"rank {rank} of {size} died without a word") from None
                if not good:
                    raise RankFailed(result)
                results[rank] = result
    finally:
        for process in processes:
            with contextlib.suppress(Exception):
                process.kill()
                process.join(10)
    return [results[rank] for rank in range(size)]
