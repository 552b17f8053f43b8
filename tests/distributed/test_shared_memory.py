"""Collectives over shared memory mean what gloo's mean."""

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from tests.distributed.ranks import Pool
from tests.distributed.shared_memory import RING

SIZE = 4
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memfd_create")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Whole numbers of this rank, so that the order of sums is of no matter."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(-8, 8, shape, generator=generator).to(dtype)


def reductions(op: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    everywhere, here = numbers(3, 5, dtype=dtype), numbers(3, 5, dtype=dtype)
    dist.all_reduce(everywhere, op)
    dist.reduce(here, dst=2, op=op)
    found = [everywhere, here if dist.get_rank() == 2 else torch.zeros(0)]
    if op == ReduceOp.SUM:
        part, parts = torch.empty(2, 3, dtype=dtype), torch.empty(2, 3, dtype=dtype)
        dist.reduce_scatter_tensor(part, numbers(2 * SIZE, 3, dtype=dtype))
        dist.reduce_scatter(parts, list(numbers(2 * SIZE, 3, dtype=dtype).chunk(SIZE)))
        found += [part, parts]
    return found


def copies() -> list[Any]:
    rank = dist.get_rank()
    broadcast, one = numbers(7), torch.tensor(float(rank))
    strided = numbers(4, 6).t()
    dist.broadcast(broadcast, src=1)
    dist.broadcast(one, src=3)
    dist.all_reduce(strided)
    each, flat = [torch.empty(2, 2) for _ in range(SIZE)], torch.empty(2 * SIZE, 2)
    dist.all_gather(each, numbers(2, 2))
    dist.all_gather_into_tensor(flat, numbers(2, 2))
    there = [torch.empty(3) for _ in range(SIZE)] if rank == 1 else None
    dist.gather(numbers(3), there, dst=1)
    swapped, single = list(torch.empty(SIZE, 2).unbind()), torch.empty(SIZE, 2)
    dist.all_to_all(swapped, list(numbers(SIZE, 2).unbind()))
    dist.all_to_all_single(single, numbers(SIZE, 2))
    nothing = torch.empty(0, dtype=torch.int64)
    dist.broadcast(nothing, src=0)
    objects: list[Any] = [None] * SIZE
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
    dist.barrier()
    return [broadcast, one, strided, *each, flat, *(there or []), *swapped, single, nothing, objects]


def groups() -> list[torch.Tensor]:
    """Two halves, the ranks of one in another order than the world's, and pairs across them."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    half, pair = numbers(4), numbers(4)
    works = [
        dist.all_reduce(half, group=halves[rank // 2], async_op=True),
        dist.all_reduce(pair, group=pairs[rank % 2], async_op=True),
    ]
    for work in reversed(works):
        work.wait()
    return [half, pair]


def messages() -> list[torch.Tensor]:
    """Around a ring, more at once than its memory holds, waited for in another order than sent."""
    rank, count = dist.get_rank(), 9
    length = RING // 4 // (count - 4)
    sent = [dist.isend(numbers(length) + i, (rank + 1) % SIZE, tag=i % 2) for i in range(count)]
    found = [torch.empty(length) for _ in range(count)]
    received = [dist.irecv(found[i], (rank - 1) % SIZE, tag=i % 2) for i in range(count)]
    for work in [*reversed(received), *sent]:
        work.wait()
    back, there = torch.empty(3), numbers(3)
    operations = [dist.P2POp(dist.irecv, back, (rank + 1) % SIZE), dist.P2POp(dist.isend, there, (rank - 1) % SIZE)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [*found, back]


CALLS = {
    **{
        f"{name} of {dtype}": partial(reductions, op, dtype)
        for name, op in {"sum": ReduceOp.SUM, "max": ReduceOp.MAX, "min": ReduceOp.MIN}.items()
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64)
    },
    "copies": copies,
    "groups": groups,
    "messages": messages,
}


def over_gloo(call: Any) -> Any:
    dist.init_process_group("gloo")
    return over_mesh(call)


def over_mesh(call: Any) -> Any:
    result = call()
    dist.destroy_process_group()
    return [x.float().tolist() if isinstance(x, torch.Tensor) else x for x in result]


@pytest.fixture(scope="module")
def pools() -> Any:
    with Pool(SIZE) as gloo, Pool(SIZE, shared_memory=True) as mesh:
        yield gloo, mesh


@pytest.mark.parametrize("name", CALLS)
def test_every_call_does_what_gloo_does(name: str, pools: tuple[Pool, Pool]) -> None:
    gloo, mesh = pools
    wanted = gloo.run(over_gloo, CALLS[name])
    assert mesh.run(over_mesh, CALLS[name]) == wanted
