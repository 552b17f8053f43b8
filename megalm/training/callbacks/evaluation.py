"""The loss on held-out text during training."""

import math
from typing import Any

from megalm.training.run import Callback, Run


class Evaluation(Callback):
    """Adds {corpus: nats per token} to the record as `held_out`, and {corpus: bits per byte} as `bits_per_byte`, every
    evaluate.every steps, or evaluate.epochs passes over the data, and at the end.

    Both are over all tokens of a corpus's held-out sequences, on all ranks: the layout does not enter. Bits per byte
    can be compared between tokenizers.
    """

    def __init__(self, every: int, held_out_bytes: dict[str, int], between: float = 0.0):
        """held_out_bytes: of the text that the corpus's evaluated tokens stand for. between: samples from one
        evaluation to the next, in place of `every` steps."""
        self._every = every
        self._between = between
        self._bytes = held_out_bytes

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if not run.held_out or not self._due(run, record) or record.get("rolled_back"):
            return
        record["held_out"], record["bits_per_byte"] = {}, {}
        for name, batches in run.held_out.items():
            loss, tokens = run.engine.evaluate(batches)
            record["held_out"][name] = loss
            if self._bytes[name]:
                record["bits_per_byte"][name] = loss * tokens / math.log(2) / self._bytes[name]

    def _due(self, run: Run, record: dict[str, Any]) -> bool:
        if not self._between or run.is_last_step:
            return run.due(self._every)
        now = record["samples"]
        return now // self._between > (now - run.config.train.global_batch_size) // self._between
