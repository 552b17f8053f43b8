"""Which rank is slow: the others wait for it in every step, so that only each rank's own work tells them apart."""

import socket
from statistics import median, quantiles
from typing import Any

from megalm.training.run import Callback, Run

SLOW = 1.5
"""A rank is named if its own work takes so many times the median of its peers'"""
_SECONDS = 0.02
"""and so many seconds more."""


class Stragglers(Callback):
    """Every `every` steps, and at the end, compares the ranks' own work: getting samples and forward passes.

    Writes the percentiles of all ranks as an event, and names a rank that is far slower than those of the same
    pipeline stage.
    """

    def __init__(self, every: int):
        self._every = every
        self._seconds: list[float] = []

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        own = record.pop("own_seconds")
        if not self._every or run.groups.size == 1:
            return
        self._seconds.append(own)
        if not run.due(self._every):
            return
        # The first step of a process is not like the others.
        seconds, self._seconds = self._seconds[1:] or self._seconds, self._seconds[:1]
        cuts = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
        mine = (socket.gethostname(), run.groups.stage, cuts[4], cuts[8], max(seconds))
        ranks = run.groups.gather(mine)
        if not run.is_main:
            return
        run.event(
            "ranks",
            step=run.step,
            hosts=[host for host, *_ in ranks],
            p50=[round(p50, 5) for _, _, p50, _, _ in ranks],
            p90=[round(p90, 5) for *_, p90, _ in ranks],
            max=[round(most, 5) for *_, most in ranks],
        )
        for rank, ours, theirs in slow([(stage, p50) for _, stage, p50, _, _ in ranks]):
            host = ranks[rank][0]
            times = f"its own work takes {ours:.3f} s a step, that of its peers {theirs:.3f} s"
            run.say(f"rank {rank} on {host} is slow: {times}")
            run.event("slow rank", step=run.step, rank=rank, host=host, seconds=ours, others=theirs)


def slow(work: list[tuple[int, float]]) -> list[tuple[int, float, float]]:
    """Ranks that are far slower than their peers, with both times. work: of every rank, its stage and its seconds.

    Peers are the other ranks of the stage; of a stage with one rank, all others.
    """
    found = []
    for rank, (stage, seconds) in enumerate(work):
        others = [(s, t) for other, (s, t) in enumerate(work) if other != rank]
        peers = [t for s, t in others if s == stage] or [t for _, t in others]
        usual = median(peers)
        if seconds > SLOW * usual and seconds - usual > _SECONDS:
            found.append((rank, seconds, usual))
    return found
