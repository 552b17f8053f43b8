"""A run in progress: what the loop and its callbacks share."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalm.checkpoint.saver import Saver
from megalm.data.loader import Loader
from megalm.metrics.events import TRAINER, write_event
from megalm.parallel.engine import Engine, MicroBatch
from megalm.parallel.groups import Beside, Groups
from megalm.training.config import RunConfig
from megalm.training.lock import Lock
from megalm.training.plan import Plan
from megalm.training.whereabouts import Whereabouts

DONE, ANOMALY, PREEMPTED = 0, 3, 75
"""Exit codes of a run."""


class Callback:
    """A concern of the loop. Every rank calls every hook, in the order of build.py's list."""

    def on_start(self, run: "Run") -> None:
        """Before the first step, after a checkpoint was loaded."""

    def after_step(self, run: "Run", record: dict[str, Any]) -> None:
        """After every step. Callbacks add to `record`; the last ones write it."""

    def on_end(self, run: "Run") -> None:
        """Once, however the run ends, on every rank that got that far."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs back; kept in the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what state() returned."""


@dataclass
class Run:
    """layer_names: of the whole model, in order. held_out: this rank's micro-batches per corpus. facts: what
    was chosen for this run, for its log. beside: all ranks, for the saver's thread. checkpoint_bytes: of one
    checkpoint's tensors. step: optimizer steps done. tokens: trained tokens so far. sample_ids: of this rank's
    micro-batches in the newest step. stop: an exit code once the run should end. blocked: seconds the newest save held
    up training. failed_saves: checkpoints that could not be written. full: whether the disk was, when records were
    written. best: step of the best evaluation so far, whose checkpoint is kept, where evaluate.keep_best says so."""

    plan: Plan
    groups: Groups
    engine: Engine
    callbacks: list[Callback]
    lock: Lock
    saver: Saver
    beside: Beside
    layer_names: list[str]
    held_out: dict[str, list[MicroBatch]]
    loader: Loader
    facts: dict[str, str]
    whereabouts: Whereabouts
    checkpoint_bytes: int = 0
    step: int = 0
    tokens: int = 0
    data_state: dict[str, Any] = field(default_factory=dict)
    sample_ids: list[int] = field(default_factory=list)
    stop: int | None = None
    blocked: float = 0.0
    failed_saves: int = 0
    full: bool = False
    best: int | None = None

    @property
    def config(self) -> RunConfig:
        return self.plan.config

    @property
    def directory(self) -> Path:
        return Path(self.plan.config.run.directory)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.groups.rank == 0

    @property
    def is_last_step(self) -> bool:
        return self.step >= self.config.train.steps

    def say(self, message: str) -> None:
        """A line for the person who watches, once, whatever the number of ranks; a progress bar stays whole."""
        if self.is_main:
            tqdm.write(message)
            sys.stdout.flush()

    def attempt(self, write: Callable[..., object], *arguments: Any, **facts: Any) -> bool:
        """Whether `write` could write what there is to tell of the run. A full disk is said once, and ends nothing."""
        try:
            write(*arguments, **facts)
        except OSError as error:
            if not self.full:
                self.say(f"warning: records of the run cannot be written ({error}); training goes on: make room")
            self.full = True
            return False
        return True

    def event(self, kind: str, **facts: Any) -> None:
        """Write down what happened, for who reads the run's history (metrics/events.py), on one rank."""
        if self.is_main:
            self.attempt(write_event, self.directory / TRAINER, kind, **facts)

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps, and at the end, happens now."""
        return self.is_last_step or bool(every and self.step % every == 0)
