"""Before the first step, in seconds: whether all machines are fit for this run together. Every rank calls it."""

import hashlib
import math
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megalm.config import dump
from megalm.errors import MegalmError
from megalm.models import tuning as tunings
from megalm.parallel.groups import Groups
from megalm.training.plan import Plan
from megalm.training.resume import saved_numbers
from megalm.training.whereabouts import Whereabouts

CLOCKS = 5.0
"""Seconds by which clocks may differ; less cannot be told from how ranks leave a barrier."""
SLOW = 2.0
"""A machine is named if its best time for the same work is so many times the median."""
PACKAGES = ("torch", "deepspeed", "megatron-core")


@dataclass(frozen=True)
class Fitness:
    """summary: one line for the log. warnings: what a person should look at although the run can go on."""

    summary: str
    warnings: list[str]


def examine(planned: Plan, joined: Groups, device: torch.device, whereabouts: Whereabouts) -> Fitness:
    """Raises MegalmError on all ranks, naming the machine, if code, config or package versions differ between ranks, if
    the run's folder cannot be written from one, or a collective gives a wrong result.
    """
    started = time.perf_counter()
    whereabouts.note("preflight: code and config")
    hosts = joined.gather(socket.gethostname())
    _require_same(planned, joined, hosts)
    whereabouts.note("preflight: folders")
    _require_folders(planned, joined, hosts)
    warnings = [*_clocks(joined, hosts), *_room(planned, joined), *_slow_machines(joined, hosts, device, whereabouts)]
    rates = list(_collectives(joined, device, whereabouts))
    machines = len(set(hosts))
    agree = f"{joined.size} ranks on {machines} machine{'s' if machines > 1 else ''} agree"
    summary = "; ".join([agree, *rates, f"{time.perf_counter() - started:.1f} s"])
    return Fitness(summary, warnings)


def _require_same(planned: Plan, joined: Groups, hosts: list[str]) -> None:
    package = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    mine = {
        "the code in megalm/": code.hexdigest(),
        "the config": hashlib.sha256(dump(planned.config).encode()).hexdigest(),
        **{name: version(name) for name in PACKAGES},
    }
    first, *others = joined.gather(mine)
    for rank, theirs in enumerate(others, start=1):
        for what, value in theirs.items():
            if value != (ours := first[what]):
                shown = f" ({value}, there {ours})" if what in PACKAGES else ""
                raise MegalmError(
                    f"{what} of rank {rank} on {hosts[rank]} is another than that of rank 0 on {hosts[0]}{shown}: "
                    "start all ranks from one checkout and environment",
                    echo=joined.rank > 0,
                )


def _require_folders(planned: Plan, joined: Groups, hosts: list[str]) -> None:
    """The run's folder can be written on every machine, and it is the same folder. (Every rank's plan() has looked at
    the data.)"""
    directory = Path(planned.config.run.directory)
    probe = directory / f".preflight-{joined.rank}"
    fault = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text(hosts[joined.rank])
    except (OSError, MegalmError) as error:
        fault = str(error)
    faults = joined.gather(fault)
    there = {path.name for path in directory.glob(".preflight-*")} if directory.is_dir() else set()
    seen = joined.gather(sum(f".preflight-{rank}" in there for rank in range(joined.size)))
    joined.barrier()
    with suppress(OSError):
        probe.unlink(missing_ok=True)
    for rank, found in enumerate(faults):
        if found:
            raise MegalmError(f"rank {rank} on {hosts[rank]}: {found}", echo=joined.rank > 0)
    if min(seen) < joined.size:
        rank = seen.index(min(seen))
        raise MegalmError(
            f"run.directory {directory} on {hosts[rank]} is not that of the other machines: name a folder on a file "
            "system that all of them share",
            echo=joined.rank > 0,
        )


def _clocks(joined: Groups, hosts: list[str]) -> Iterator[str]:
    joined.barrier()
    times = joined.gather(time.time())
    usual = median(times)
    worst = max(range(len(times)), key=lambda rank: abs(times[rank] - usual))
    if abs(times[worst] - usual) > CLOCKS:
        ahead = "ahead" if times[worst] > usual else "behind"
        seconds = abs(times[worst] - usual)
        yield f"the clock of {hosts[worst]} is {seconds:.0f} s {ahead}: logs will not fit; synchronise it (chrony, ntp)"


def _room(planned: Plan, joined: Groups) -> Iterator[str]:
    config = planned.config
    directory = Path(config.run.directory)

    def look() -> tuple[int, int]:
        shapes = tunings.shapes(config.model, config.tuning)
        sizes = ((name, math.prod(shape)) for name, shape in shapes.items())
        return shutil.disk_usage(directory).free, 4 * saved_numbers(sizes, config.tuning)

    free, needed = joined.decide(look)
    if free < 2 * needed:
        yield (
            f"{directory} has {free / 1e9:.1f} GB free and a checkpoint takes {needed / 1e9:.1f} GB: the next ones "
            "will not fit; make room, or set checkpoint.keep_last"
        )


def _slow_machines(joined: Groups, hosts: list[str], device: torch.device, whereabouts: Whereabouts) -> Iterator[str]:
    """Every rank does the same small work; a machine whose best rank is far slower than the others is named."""
    whereabouts.note("preflight: matrix product")
    size = 4096 if device.type == "cuda" else 256
    matrix = torch.ones(size, size, device=device)

    def once() -> float:
        started = time.perf_counter()
        (matrix @ matrix).sum().item()
        return time.perf_counter() - started

    best = min(once() for _ in range(5))
    times: dict[str, float] = {}
    for host, seconds in zip(hosts, joined.gather(best), strict=True):
        times[host] = min(seconds, times.get(host, seconds))
    for host, seconds in times.items():
        others = [theirs for name, theirs in times.items() if name != host]
        if others and seconds > SLOW * median(others):
            yield f"{host} is slow: a matrix product takes it {seconds / median(others):.1f} times that of the others"


def _collectives(joined: Groups, device: torch.device, whereabouts: Whereabouts) -> Iterator[str]:
    """The sum over every group of more than one rank is right, and how fast it is."""
    groups = {
        "all": dist.group.WORLD,
        "data": joined.data_group,
        "tensor": joined.tensor_group,
        "model": joined.model_group,
    }
    numbers = (64 if device.type == "cuda" else 1) * 2**18
    for name, group in groups.items():
        ranks = dist.get_process_group_ranks(group)
        sizes = joined.gather(len(ranks))
        if max(sizes) == 1:
            continue
        whereabouts.note(f"preflight: all-reduce over the {name} group")
        tensor = torch.empty(numbers, device=device)
        best = float("inf")
        for _ in range(3):
            tensor.fill_(joined.rank)
            started = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            total = tensor[-1].item()
            best = min(best, time.perf_counter() - started)
        right = total == tensor[0].item() == sum(ranks)
        wrong = [rank for rank, fine in enumerate(joined.gather(right)) if not fine]
        if wrong:
            raise MegalmError(
                f"an all-reduce over the {name} group gives rank {wrong[0]} a wrong sum: check its network, and "
                "that all machines have the same torch",
                echo=joined.rank > 0,
            )
        # Of a ring: each byte is sent and received about twice.
        rate = numbers * 4 * 2 * (len(ranks) - 1) / len(ranks) / best / 1e9
        slowest = min(joined.gather(rate))
        yield f"{name} ({len(ranks)}) {slowest:.1f} GB/s"
