"""Python's garbage collector, run by all ranks at the same step instead of by each at its own whim."""

import gc
from typing import Any

from megalm.training.run import Callback, Run


class GarbageCollection(Callback):
    """Collects every `every` steps and never in between; 0 leaves Python's own timing."""

    def __init__(self, every: int):
        self._every = every

    def on_start(self, run: Run) -> None:
        if self._every:
            gc.collect()
            gc.disable()

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if self._every and run.step % self._every == 0:
            gc.collect()

    def on_end(self, run: Run) -> None:
        gc.enable()
