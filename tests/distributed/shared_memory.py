"""Collectives between the ranks of one machine through memory that they share.

An all-reduce of eight gloo ranks passes a hundred messages through the kernel's TCP: on two cores that is a hundred
times the arithmetic of the matrix' models. Here a message is a copy into a ring, and only a rank that waits costs a
switch. What the matrix asks of collectives is what they mean, and that is the same: test_shared_memory.py holds each
against gloo's. Sums run in the order of ranks.

Collectives are done when their call returns, so code that forgot to wait for one would pass: the layouts that make
test holds run over gloo.
"""

import mmap
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

NAME = "shared_memory"
RING = 1 << 20
"""Bytes of the ring from one rank to another; the system gives it what is touched."""
ALIGNED = 64
"""Messages start at multiples of it, behind a header of as many bytes."""
PATIENCE = 240.0
"""Seconds that a rank waits for a message."""
REDUCTIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.Tensor.add_,
    ReduceOp.AVG: torch.Tensor.add_,
    ReduceOp.PRODUCT: torch.Tensor.mul_,
    ReduceOp.MAX: lambda a, b: torch.maximum(a, b, out=a),
    ReduceOp.MIN: lambda a, b: torch.minimum(a, b, out=a),
}


class Mesh:
    """Rings from every rank to every other. Made before the ranks and handed to each, which calls `enter`."""

    def __init__(self, context: BaseContext, size: int) -> None:
        self.size = size
        self._memory = os.memfd_create(NAME)
        os.ftruncate(self._memory, size * size * (ALIGNED + RING))
        self._path = f"/proc/{os.getpid()}/fd/{self._memory}"
        self._arrivals = [context.Semaphore(0) for _ in range(size)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": None}  # ranks open the path

    def close(self) -> None:
        os.close(self._memory)

    def enter(self, rank: int) -> None:
        """Serve as rank `rank` of it: the backend `shared_memory` of torch.distributed is there then."""
        file = os.open(self._path, os.O_RDWR)
        memory = np.frombuffer(mmap.mmap(file, self.size * self.size * (ALIGNED + RING)), np.uint8)
        os.close(file)
        rings = memory.reshape(self.size, self.size, ALIGNED + RING)  # [from, to]
        # Of each ring the bytes written and read, and what it holds.
        self._to = [(ring[:ALIGNED].view(np.int64), ring[ALIGNED:]) for ring in rings[rank]]
        self._from = [(ring[:ALIGNED].view(np.int64), ring[ALIGNED:]) for ring in rings[:, rank]]
        self._rank = rank
        self._asked: dict[tuple[int, int], int] = defaultdict(int)
        self._arrived: dict[tuple[int, int], int] = defaultdict(int)
        self._messages: dict[tuple[int, int, int], np.ndarray] = {}
        dist.Backend.register_backend(NAME, lambda options, _: Group(self, options), extended_api=True, devices=["cpu"])

    def start(self) -> None:
        """torch.distributed over this mesh."""
        # A group's first messages wait in the rings until its other ranks have made it too.
        dist.distributed_c10d._store_based_barrier = lambda *args, **kwargs: None
        dist.init_process_group(NAME, store=dist.HashStore(), rank=self._rank, world_size=self.size)

    def send(self, to: int, channel: int, message: np.ndarray) -> None:
        counters, data = self._to[to]
        length = _length(message.size)
        assert length < RING // 2, f"a message of {message.size} bytes needs a larger ring"
        written = int(counters[0])
        rest = RING - written % RING
        skipped = rest if length > rest else 0
        while written + skipped + length - int(counters[1]) > RING:
            self._take_all()  # so that two ranks that fill each other's ring go on
            os.sched_yield()
        if skipped:
            data[written % RING :][:ALIGNED].view(np.int64)[0] = -1
            written += skipped
        place = written % RING
        data[place : place + ALIGNED].view(np.int64)[:2] = message.size, channel
        data[place + ALIGNED : place + ALIGNED + message.size] = message
        counters[0] = written + length
        self._arrivals[to].release()

    def ask(self, source: int, channel: int) -> Callable[[], np.ndarray]:
        """The next message from a rank that nobody asked for yet, once it is called."""
        number = self._asked[source, channel]
        self._asked[source, channel] += 1

        def receive() -> np.ndarray:
            while (source, channel, number) not in self._messages:
                if not self._take(source) and not self._arrivals[self._rank].acquire(timeout=PATIENCE):
                    raise TimeoutError(f"rank {self._rank} had no message of rank {source} for {PATIENCE} s")
            return self._messages.pop((source, channel, number))

        return receive

    def _take_all(self) -> None:
        for source in range(self.size):
            while self._take(source):
                pass

    def _take(self, source: int) -> bool:
        """Copy the next message out of a ring, if there is one."""
        counters, data = self._from[source]
        read = int(counters[1])
        if read == int(counters[0]):
            return False
        place = read % RING
        size, channel = data[place : place + ALIGNED].view(np.int64)[:2].tolist()
        if size < 0:
            counters[1] = read + RING - place
            return self._take(source)
        number = self._arrived[source, channel]
        self._arrived[source, channel] += 1
        self._messages[source, channel, number] = data[place + ALIGNED : place + ALIGNED + size].copy()
        counters[1] = read + _length(size)
        return True


def _length(size: int) -> int:
    """Bytes in a ring of a message of `size` bytes, its header among them."""
    return ALIGNED + -(-size // ALIGNED) * ALIGNED


class Done(dist.Work):
    """A collective that is over, or a receipt that happens when it is waited for."""

    def __init__(self, receipt: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._receipt = receipt

    def wait(self, timeout: Any = None) -> bool:
        receipt, self._receipt = self._receipt, None
        if receipt:
            receipt()
        return True

    def is_completed(self) -> bool:
        return self._receipt is None


class Group(dist.ProcessGroup):
    """Some ranks of a mesh. Methods have the names and the arguments by which torch.distributed calls them."""

    def __init__(self, mesh: Mesh, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        self._mesh, self._name = mesh, str(options.group_id)
        self._me = options.group_rank
        self._members = list(options.global_ranks_in_group) or list(range(mesh.size))
        self._collectives = self._channel("collectives")

    def _channel(self, what: object) -> int:
        return zlib.crc32(f"{self._name} {self._members} {what}".encode())

    def size(self) -> int:
        return len(self._members)

    def getBackendName(self) -> str:
        return NAME

    @property
    def pg_name(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    # What everything is made of.

    def _send(self, to: int, tensor: Tensor) -> None:
        self._mesh.send(self._members[to], self._collectives, _bytes(tensor))

    def _receive(self, source: int, like: Tensor) -> Tensor:
        return _tensor(self._mesh.ask(self._members[source], self._collectives)(), like)

    def _exchange(self, mine: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """mine[r] to each rank r; what each has for this one, shaped like `like`."""
        for rank in range(self.size()):
            if rank != self._me:
                self._send(rank, mine[rank])
        return [mine[r].clone() if r == self._me else self._receive(r, like) for r in range(self.size())]

    def _sum(self, terms: list[Tensor], op: Any) -> Tensor:
        reduce = next(function for known, function in REDUCTIONS.items() if op == known)
        for term in terms[1:]:
            reduce(terms[0], term)
        return terms[0].div_(len(terms)) if op == ReduceOp.AVG else terms[0]

    # Collectives.

    @torch.no_grad()
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Done:
        op = opts.reduceOp if opts else ReduceOp.SUM
        for tensor in tensors:
            tensor.copy_(self._sum(self._exchange([tensor] * self.size(), tensor), op))
        return Done()

    allreduce_coalesced = allreduce

    @torch.no_grad()
    def reduce(self, tensors: list[Tensor], opts: Any) -> Done:
        [tensor] = tensors
        if self._me != opts.rootRank:
            self._send(opts.rootRank, tensor)
            return Done()
        terms = [tensor.clone() if r == self._me else self._receive(r, tensor) for r in range(self.size())]
        tensor.copy_(self._sum(terms, opts.reduceOp))
        return Done()

    @torch.no_grad()
    def broadcast(self, tensors: list[Tensor], opts: Any) -> Done:
        for tensor in tensors:
            if self._me == opts.rootRank:
                for rank in range(self.size()):
                    if rank != self._me:
                        self._send(rank, tensor)
            else:
                tensor.copy_(self._receive(opts.rootRank, tensor))
        return Done()

    @torch.no_grad()
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, tensor in zip(outputs, inputs, strict=True):
            for there, found in zip(output, self._exchange([tensor] * self.size(), tensor), strict=True):
                there.copy_(found.view_as(there))
        return Done()

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Done:
        return self.allgather([list(_pieces(output, self.size()))], [tensor])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor)
        return Done()

    @torch.no_grad()
    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Done:
        for output, tensors in zip(outputs, inputs, strict=True):
            found = self._sum(self._exchange(tensors, tensors[self._me]), opts.reduceOp)
            output.copy_(found.view_as(output))
        return Done()

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> Done:
        return self.reduce_scatter([output], [list(_pieces(tensor, self.size()))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> Done:
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return Done()

    @torch.no_grad()
    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Done:
        [tensor] = inputs
        if self._me != opts.rootRank:
            self._send(opts.rootRank, tensor)
            return Done()
        for rank, output in enumerate(outputs[0]):
            output.copy_(tensor if rank == self._me else self._receive(rank, output))
        return Done()

    @torch.no_grad()
    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for rank in range(self.size()):
            if rank != self._me:
                self._send(rank, inputs[rank])
        for rank, output in enumerate(outputs):
            output.copy_(inputs[rank] if rank == self._me else self._receive(rank, output))
        return Done()

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], sizes: list[int], opts: Any = None
    ) -> Done:
        assert not output_sizes and not sizes, "uneven pieces are not needed yet"
        return self.alltoall(list(_pieces(output, self.size())), list(_pieces(tensor, self.size())))

    def barrier(self, opts: Any = None) -> Done:
        return self.allreduce([torch.zeros(1)])

    # From one rank to another.

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Done:
        for tensor in tensors:
            self._mesh.send(self._members[to], self._channel(tag), _bytes(tensor))
        return Done()

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Done:
        [tensor] = tensors
        receive = self._mesh.ask(self._members[source], self._channel(tag))
        return Done(lambda: tensor.detach().copy_(_tensor(receive(), tensor)))


def _pieces(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    return tensor.view(-1).chunk(count)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()


def _tensor(message: np.ndarray, like: Tensor) -> Tensor:
    found = torch.empty(like.shape, dtype=like.dtype)
    _bytes(found)[:] = message
    return found
