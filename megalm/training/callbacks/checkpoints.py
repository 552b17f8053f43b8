"""Saves the run every checkpoint.every steps, at its last step, and when a signal ends it."""

from typing import Any

from megalm.training.resume import save, settle
from megalm.training.run import PREEMPTED, Callback, Run


class Checkpoints(Callback):
    """Stands after the callbacks whose state it saves. Only a run that ends waits for its checkpoint."""

    def __init__(self, every: int):
        self._every = every

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        due = run.due(self._every) and not record.get("rolled_back")
        preempted = run.stop == PREEMPTED
        if due or preempted:
            save(run, wait=run.is_last_step or preempted)
        else:
            settle(run, wait=False)

    def on_end(self, run: Run) -> None:
        settle(run, wait=True)
