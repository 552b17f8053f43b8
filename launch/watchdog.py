"""Where ranks are, in plain words, and which of them keeps the others waiting."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Note = dict[str, Any]
"""What a rank noted: n (how many notes so far), step (done; None before the loop), since (seconds since 1970), at
(words)."""

_WAITING = (
    re.compile(
        r'File "[^"]*(?:torch/distributed/|deepspeed/comm/|pipe/p2p|core/tensor_parallel/mappings)'
        r'[^"]*", line \d+ in (\w+)'
    ),
    # NCCL's collectives return at once: a host waits where it asks for a number that its GPU does not have yet.
    re.compile(
        r'File "[^"]*(?:torch/cuda/streams|deepspeed/runtime/utils|megalm/parallel/groups)\.py", line \d+ in (\w+)'
    ),
    re.compile(r'File "[^"]*megalm/parallel/(?:device|engine)\.py", line \d+ in (number|take|_gradient_norm|<lambda>)'),
)
_RECEIVING = "pipeline receive"
"""Notes that begin so are of a rank that waits for another, whatever its stack shows."""
_FRAMES = 12
"""Frames of a stack that are looked at: a rank waits if one of its innermost ones is in communication."""


class Watchdog:
    """Notices that no rank has got anywhere for too long. Ranks that note nothing are not watched."""

    def __init__(self, start_within: float, hang_after: float):
        self._limits = start_within, hang_after
        self._moved = time.monotonic()
        self._first_step: int | None = None
        self.places: dict[int, Note] = {}

    def saw(self, rank: int, note: Note | None) -> None:
        if note and note != self.places.get(rank):
            self.places[rank] = note
            self._moved = time.monotonic()
            if self._first_step is None and note["step"] is not None:
                self._first_step = note["step"]

    def gone(self, rank: int) -> None:
        """The rank has ended."""
        self.places.pop(rank, None)
        self._moved = time.monotonic()

    @property
    def step(self) -> int:
        """The step that the farthest rank is in."""
        return max((note["step"] or 0 for note in self.places.values()), default=0)

    @property
    def has_stepped(self) -> bool:
        return self._first_step is not None and self.step > self._first_step

    @property
    def limit(self) -> float:
        """Seconds that may pass now: more before the first step, when a checkpoint is read and kernels are built."""
        return self._limits[1] if self.has_stepped else self._limits[0]

    @property
    def hangs(self) -> bool:
        return bool(self.places) and time.monotonic() - self._moved > self.limit


@dataclass(frozen=True)
class Diagnosis:
    """lines: where each rank is. culprit: the rank that the others wait for, None if that cannot be told."""

    lines: list[str]
    culprit: int | None


def diagnose(places: Mapping[int, Note], stacks: Mapping[int, str], nodes: Mapping[int, str]) -> Diagnosis:
    """Say of every rank where it is and since when; those that wait for others last.

    The culprit is the rank that does not wait: the one that is behind in steps, else the longest in its place.
    """
    now = time.time()
    waits = {rank: waiting(stacks.get(rank, "")) for rank in places}
    busy = [rank for rank in places if not waits[rank] and not places[rank]["at"].startswith(_RECEIVING)]

    def line(rank: int) -> str:
        note, function = places[rank], waits[rank]
        where = note["at"] + (f" ({function})" if function else "")
        does = "is in" if rank in busy else "waits in"
        since = f"since {now - note['since']:.0f} s"
        step = "before the first step" if note["step"] is None else f"step {note['step'] + 1}"
        return f"rank {rank} ({nodes.get(rank, '?')}) {does} {where}, {step}, {since}"

    # Of several that are at work, all but one usually wait for something that no stack shows.
    order = sorted(busy or places, key=lambda rank: (places[rank]["step"] or 0, places[rank]["since"], rank))
    rest = sorted(set(places) - set(order))
    return Diagnosis([line(rank) for rank in [*order, *rest]], order[0] if busy else None)


def waiting(stack: str) -> str | None:
    """The communication in which a rank's main thread is, or None; `stack`: what faulthandler wrote.

    Over GPUs a stack does not tell a rank that waits for others from one whose own GPU is stuck: all then wait.
    """
    for thread in re.split(r"\n\s*\n", stack.strip()):
        innermost = thread.splitlines()[: _FRAMES + 1]
        # faulthandler writes the thread that was interrupted by the signal, the main one, as the current one.
        if innermost and innermost[0].startswith("Current thread"):
            for frame in innermost[1:]:
                for pattern in _WAITING:
                    if found := pattern.search(frame):
                        return found.group(1)
    return None
