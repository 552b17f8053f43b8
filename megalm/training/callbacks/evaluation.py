"""The loss on what was held out, and the task's scores, during training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megalm.sft.report import Prediction, Predictions, write_predictions
from megalm.sft.scoring import Scorer
from megalm.training.run import Callback, Run


class Evaluation(Callback):
    """Adds {corpus: nats per token} to the record as `held_out`, and {corpus: bits per byte} as `bits_per_byte`, every
    evaluate.every steps, or evaluate.epochs passes over the data, and at the end.

    Both are over all tokens of a corpus's held-out sequences, on all ranks: the layout does not enter. Bits per byte
    can be compared between tokenizers. A task with a head of its own has {corpus: {metric: value}} as `scores` instead
    of the latter, and its predictions in RUN/predictions.
    """

    def __init__(
        self,
        every: int,
        held_out_bytes: dict[str, int],
        scorers: Mapping[str, Scorer] | None = None,
        between: float = 0.0,
    ) -> None:
        """held_out_bytes: of the text that the corpus's evaluated tokens stand for. scorers: by corpus. between:
        samples from one evaluation to the next, in place of `every` steps."""
        self._scorers = scorers or {}
        self._every = every
        self._between = between
        self._bytes = held_out_bytes
        self._said: dict[str, Sequence[Prediction]] = {}  # of the newest evaluation, on rank 0

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if not run.held_out or not self._due(run, record) or record.get("rolled_back"):
            return
        record["held_out"], record["bits_per_byte"], record["scores"] = {}, {}, {}
        for name, batches in run.held_out.items():
            loss, tokens = run.engine.evaluate(batches)
            record["held_out"][name] = loss
            if self._bytes.get(name):
                record["bits_per_byte"][name] = loss * tokens / math.log(2) / self._bytes[name]
            if name in self._scorers:
                record["scores"][name] = self._score(run, name)
        if self._said and run.is_main:
            task = next(iter(self._scorers.values())).task
            write_predictions(run.directory, Predictions(run.step, task.config.kind, task.labels, self._said))
        for key in ("bits_per_byte", "scores"):
            if not record[key]:
                del record[key]

    def _due(self, run: Run, record: dict[str, Any]) -> bool:
        if not self._between or run.is_last_step:
            return run.due(self._every)
        now = record["samples"]
        return now // self._between > (now - run.config.train.global_batch_size) // self._between

    def _score(self, run: Run, name: str) -> dict[str, float]:
        """The same on every rank."""
        scorer = self._scorers[name]
        logits = run.engine.predict(run.held_out[name])

        def score() -> dict[str, float]:
            self._said[name] = scorer.predictions(logits)
            return scorer.task.score(self._said[name])

        return run.groups.decide(score)
