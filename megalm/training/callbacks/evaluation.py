"""The loss on held-out text during training."""

import math
from typing import Any

from megalm.training.run import Callback, Run


class Evaluation(Callback):
    """Adds {corpus: nats per token} to the record as `held_out`, and {corpus: bits per byte} as `bits_per_byte`, every
    evaluate.every steps and at the end.

    Both are over all tokens of a corpus's held-out sequences, on all ranks: the layout does not enter. Bits per byte
    can be compared between tokenizers.
    """

    def __init__(self, every: int, held_out_bytes: dict[str, int]):
        """held_out_bytes: of the text that the corpus's evaluated tokens stand for."""
        self._every = every
        self._bytes = held_out_bytes

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if not run.held_out or not run.due(self._every) or record.get("rolled_back"):
            return
        record["held_out"], record["bits_per_byte"] = {}, {}
        for name, batches in run.held_out.items():
            loss, tokens = run.engine.evaluate(batches)
            record["held_out"][name] = loss
            if self._bytes[name]:
                record["bits_per_byte"][name] = loss * tokens / math.log(2) / self._bytes[name]
