"""The loss on held-out text during training."""

from typing import Any

from megalm.training.run import Callback, Run


class Evaluation(Callback):
    """Adds {corpus: nats per token} to the record as `held_out`, every evaluate.every steps and at the end."""

    def __init__(self, every: int):
        self._every = every

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if run.held_out and run.due(self._every) and not record.get("rolled_back"):
            record["held_out"] = {name: run.engine.evaluate(batches)[0] for name, batches in run.held_out.items()}
