"""Saves the run every checkpoint.every steps, at its last step, and when a signal ends it."""

from typing import Any

from megalm.training.resume import save
from megalm.training.run import PREEMPTED, Callback, Run


class Checkpoints(Callback):
    """Stands after the callbacks whose state it saves."""

    def __init__(self, every: int):
        self._every = every

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        due = run.due(self._every) and not record.get("rolled_back")
        if due or run.stop == PREEMPTED:
            save(run)
