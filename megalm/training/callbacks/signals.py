"""SIGTERM, SIGINT and SIGUSR1: finish the step, save, exit with code 75."""

import signal
import time
from types import FrameType
from typing import Any

from megalm.training.run import PREEMPTED, Callback, Run

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PATIENCE = 5.0
"""Seconds after the first signal in which all others are its echoes: launchers pass on what the terminal sent too."""


class Signals(Callback):
    """One signal on any rank ends the run on all of them after the same step. Repeated ones change nothing, but that
    SIGINT once more, some seconds later, ends this rank at once.
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def on_start(self, run: Run) -> None:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        number = int(run.groups.maximum(self._received))
        if number and run.stop is None and not run.is_last_step:
            run.stop = PREEMPTED
            run.say(
                f"{signal.Signals(number).name} received: saving after step {run.step}, then exiting with {PREEMPTED}"
            )

    def on_end(self, run: Run) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
