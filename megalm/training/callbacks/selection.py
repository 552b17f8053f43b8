"""Which evaluation is the best so far: its checkpoint is kept, and a run that no longer gets better stops."""

import math
from pathlib import Path
from typing import Any

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.errors import MegalmError
from megalm.metrics.records import evaluated
from megalm.training.config import EvaluateSection
from megalm.training.resume import directory
from megalm.training.run import DONE, PREEMPTED, Callback, Run


class Selection(Callback):
    """Adds `selection` to the record of an evaluation. Stands after the evaluation, and before what saves: a checkpoint
    is the best only once it is written.

    A value that is not a number is never the best.
    """

    def __init__(self, config: EvaluateSection):
        self._config = config
        self._best: float | None = None
        self._step = 0
        self._since = 0
        self._changed = ""

    def on_start(self, run: Run) -> None:
        if self._changed:
            run.say(f"evaluate.metric was {self._changed}: the next evaluation counts as the best so far")
        if self._config.keep_best:
            before = self._step
            self._best, self._step, self._since = run.groups.decide(lambda: self._kept(run))
            run.best = None if self._best is None else self._step
            if before and run.best != before:
                instead = f"that of step {run.best} counts" if run.best else "the next evaluation counts"
                run.say(f"the checkpoint of the best evaluation, step-{before}, is gone: {instead} as the best so far")
        if self._exhausted and not run.is_last_step:
            run.stop = DONE

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if record.get("rolled_back"):
            self._go_back(run)
        if record.get("rolled_back") or not {"held_out", "scores"} & set(record):
            return
        value = run.groups.decide(lambda: self._value(run, record))  # scores may be one rank's only
        if not math.isnan(value) and (self._best is None or self._better(value, self._best)):
            self._best, self._step, self._since = value, run.step, 0
            if self._config.keep_best:
                run.best = run.step
        else:
            self._since += 1
        record["selection"] = {"value": value, "best": self._best, "best_step": self._step, "since": self._since}
        if self._exhausted and not run.is_last_step and run.stop in (None, PREEMPTED):
            run.stop = DONE
            record["stopped_early"] = True

    def _go_back(self, run: Run) -> None:
        """To what the checkpoint says that the run was rolled back to: evaluations since then come again."""
        folder = directory(run.config) / f"step-{run.step}"
        state = run.groups.decide(lambda: checkpoints.read(folder).trainer.get(type(self).__name__))
        self._best, self._step, self._since = None, 0, 0
        if state:
            self.restore(state)
        run.best = self._step if self._config.keep_best and self._best is not None else None

    def on_end(self, run: Run) -> None:
        if not run.is_main or not (run.stop == DONE or (run.stop is None and run.is_last_step)):
            return
        if run.stop == DONE:
            run.say(
                f"stopped early at step {run.step}: {self._since} evaluations in a row were not better than the best; "
                "the run is done (a higher evaluate.patience lets it go on)"
            )
        if self._best is None:
            return
        best = f"best: {self._config.metric} {self._best:.4g} at step {self._step}"
        folder = checkpoints.best(directory(run.config)) if self._config.keep_best else None
        if folder is None:
            run.say(best)
            return
        kept = "kept" if folder.name == f"step-{self._step}" else f"which could not be saved; the best kept is {folder}"
        pointer = folder.with_name(checkpoints.BEST)
        run.say(f"{best}, {kept}; export it with: python tools/convert_checkpoint.py to-hf {pointer} OUT")

    def state(self) -> dict[str, Any]:
        return {
            "metric": self._config.metric,
            "greater": self._config.greater,
            "best": self._best,
            "step": self._step,
            "since": self._since,
        }

    def restore(self, state: dict[str, Any]) -> None:
        if self._comparable(state):
            self._best, self._step, self._since = state["best"], state["step"], state["since"]
        else:
            self._changed = f"{state['metric']} ({'greater' if state['greater'] else 'less'} is better)"

    @property
    def _exhausted(self) -> bool:
        return bool(self._config.patience and self._since >= self._config.patience)

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._config.greater else value < than

    def _comparable(self, state: dict[str, Any]) -> bool:
        return (state["metric"], state["greater"]) == (self._config.metric, self._config.greater)

    def _value(self, run: Run, record: dict[str, Any]) -> float:
        """The metric of an evaluation: the mean over its corpora."""
        said = evaluated(record)
        if self._config.metric not in said:
            raise MegalmError(
                f"step {run.step}: evaluate.metric {self._config.metric} is not among what this run's evaluations say "
                f"({', '.join(sorted(said))}): name one of these"
            )
        values = said[self._config.metric].values()
        return sum(values) / len(values)

    def _kept(self, run: Run) -> tuple[float | None, int, int]:
        """Best value, its step, and evaluations since, of a run that continues: of this state, if its checkpoint is
        there; else of the checkpoint that `best` names; else of none. `best` then says the same."""
        where = directory(run.config)
        if self._best is not None and _whole(where / f"step-{self._step}"):
            checkpoints.set_best(where, self._step)  # a crash may have come between the checkpoint and its name
            return self._best, self._step, self._since
        # The newest best could not be saved, or was of a course that the run left: the one before may still be there.
        folder = checkpoints.best(where)
        if folder is not None and (manifest := checkpoints.read(folder)).step <= run.step:
            state = manifest.trainer.get(type(self).__name__)
            if state and self._comparable(state) and state["step"] == manifest.step:
                return state["best"], state["step"], self._since
        checkpoints.set_best(where, None)
        return None, 0, 0


def _whole(folder: Path) -> bool:
    return (folder / manifests.NAME).exists()
