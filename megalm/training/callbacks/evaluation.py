"""The loss on what was held out, and the task's scores, during training."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megalm.sft.answers import Answers
from megalm.sft.metrics import perplexity
from megalm.sft.report import Prediction, Predictions, write_predictions
from megalm.sft.scoring import Scorer
from megalm.training.loop import tensors
from megalm.training.run import Callback, Run


class Evaluation(Callback):
    """Adds {corpus: nats per token} to the record as `held_out`, and {corpus: bits per byte} as `bits_per_byte`, every
    evaluate.every steps, or evaluate.epochs passes over the data, and at the end.

    Both are over all tokens of a corpus's held-out sequences, on all ranks: the layout does not enter. Bits per byte
    can be compared between tokenizers. Fine-tuning has {corpus: {metric: value}} as `scores`: of text the perplexity,
    and where the model writes answers their scores; of a head of its own those of its classes, and no bits per byte.
    What was said is in RUN/predictions.
    """

    def __init__(
        self,
        every: int,
        held_out_bytes: dict[str, int],
        scorers: Mapping[str, Scorer | Answers] | None = None,
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
            scores = self._score(run, name) if name in self._scorers else {}
            if run.config.task and run.config.model.head == "language_model":
                scores |= perplexity(loss)
            if scores:
                record["scores"][name] = scores
        if self._said and run.is_main:
            scorer = next(iter(self._scorers.values()))
            write_predictions(run.directory, Predictions(run.step, scorer.kind, scorer.labels, self._said))
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
        if isinstance(scorer, Answers):
            vocab_size = run.plan.tokenizer.vocab_size
            written = scorer.write(lambda batches: run.engine.next_tokens([*map(tensors, batches)], vocab_size))
            said = partial(scorer.predictions, written)
        else:
            said = partial(scorer.predictions, run.engine.predict(run.held_out[name]))

        def score() -> dict[str, float]:
            self._said[name] = said()
            return scorer.score(self._said[name])

        return run.groups.decide(score)
