"""Saves the run every checkpoint.every steps, after the best evaluation so far, at its last step, and when a signal or
too many evaluations without progress end it."""

from typing import Any

from megalm.training.resume import save, settle
from megalm.training.run import ANOMALY, DONE, PREEMPTED, Callback, Run


class Checkpoints(Callback):
    """Stands after the callbacks whose state it saves. Only a run that ends waits for its checkpoint."""

    def __init__(self, every: int):
        self._every = every

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        due = (run.due(self._every) or run.best == run.step) and not record.get("rolled_back")
        due = due and run.stop != ANOMALY  # whoever starts it again unchanged is to meet the same samples
        ends = run.stop in (DONE, PREEMPTED)
        if due or ends:
            save(run, wait=run.is_last_step or ends)
        else:
            settle(run, wait=False)

    def on_end(self, run: Run) -> None:
        settle(run, wait=True)
