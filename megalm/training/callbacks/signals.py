"""SIGTERM, SIGINT and SIGUSR1: finish the step, save, exit with code 75."""

import signal
from types import FrameType
from typing import Any

from megalm.training.run import PREEMPTED, Callback, Run

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals(Callback):
    """One signal on any rank ends the run on all of them after the same step; a second one ends this rank at once."""

    def __init__(self) -> None:
        self._received: int = 0
        self._previous: dict[int, Any] = {}

    def on_start(self, run: Run) -> None:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = number

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        number = run.groups.maximum(self._received)
        if number and run.stop is None and not run.is_last_step:
            run.stop = PREEMPTED
            run.say(
                f"{signal.Signals(number).name} received: saving after step {run.step}, then exiting with {PREEMPTED}"
            )

    def on_end(self, run: Run) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
