"""What ranks agree on."""

import errno
import os
import resource
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, join


def _told(error: Exception | None) -> Any:
    """On a rank: what decide() gives or raises where rank 0 meets `error`."""
    joined = join(config())

    def question() -> int:
        assert joined.rank == 0, "others are not asked"
        if error:
            raise error
        return 7

    try:
        return joined.decide(question)
    except Exception as raised:
        return type(raised).__name__, str(raised), getattr(raised, "echo", False)


def test_all_ranks_have_rank_0s_answer() -> None:
    assert run_ranks(2, _told, None) == [7, 7]


def test_no_rank_waits_for_one_that_failed() -> None:
    first, second = run_ranks(2, _told, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), timeout=60)
    assert first == ("OSError", "[Errno 122] Disk quota exceeded", False), "with its traceback"
    assert second == ("MegalmError", "[Errno 122] Disk quota exceeded", True), "in silence"


def _largest(values: list[float]) -> float:
    joined = join(config())
    return joined.maximum(values[joined.rank])


def test_the_largest_of_all_ranks() -> None:
    assert run_ranks(2, _largest, [3.0, float("inf")]) == [float("inf")] * 2
    assert run_ranks(2, _largest, [0.1 + 0.2, 0.3]) == [0.1 + 0.2] * 2


def _patience(watched: bool) -> set[timedelta]:
    """On a rank: how long its groups of a layout wait."""
    from torch.distributed import distributed_c10d

    from megalm.layout import Layout
    from megalm.parallel import groups

    if dist.is_initialized():  # by what this process did before
        groups.destroy()
    groups.start(torch.device("cpu"), groups.WATCHED if watched else groups.ALONE)
    groups.create(Layout(data=2, tensor=2))
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map}
    assert len(distributed_c10d._world.pg_map) > 3
    groups.destroy()
    return found


def test_every_group_waits_as_long_as_the_first() -> None:
    assert run_ranks(4, _patience, True) == [{timedelta(days=1)}] * 4
    assert run_ranks(4, _patience, False) == [{timedelta(minutes=30)}] * 4


def _open_files(soft: int) -> int:
    """On a rank: how many files may be open once it has joined the others, if `soft` were allowed before."""
    from megalm.parallel import groups

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
        groups._raise_limit_of_files()
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_groups_of_a_thousand_ranks_have_sockets() -> None:
    (found,) = run_ranks(1, _open_files, 256)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert found == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))
    if found > 256:
        assert run_ranks(1, _open_files, found) == [found]


def _threads(ranks: str, cuda: bool) -> int:
    from megalm.parallel import device

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setenv("LOCAL_WORLD_SIZE", ranks)
        patch.setenv("LOCAL_RANK", "0")
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
        patch.setattr(torch.cuda, "device_count", lambda: 8)
        patch.setattr(torch.cuda, "set_device", lambda index: None)
        device.local("cuda" if cuda else "cpu")
        found = torch.get_num_threads()
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("cuda", [False, True])
def test_ranks_share_the_cores(cuda: bool) -> None:
    """Those of GPUs too: they cast, copy and read on the CPU, and may have their optimizer there."""
    assert run_ranks(1, _threads, "4", cuda) == [3]
    assert run_ranks(1, _threads, "50", cuda) == [1]
