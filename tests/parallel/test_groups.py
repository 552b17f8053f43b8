"""What ranks agree on."""

import errno
import os
from typing import Any

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
