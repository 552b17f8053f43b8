"""The loss on what was held out, and the task's scores, during training."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megalm.sft.heads import Answer
from megalm.sft.scoring import Scorer
from megalm.training.run import Callback, Run


class Evaluation(Callback):
    """Adds {corpus: nats per token} to the record as `held_out`, and {corpus: bits per byte} as `bits_per_byte`, every
    evaluate.every steps and at the end.

    Both are over all tokens of a corpus's held-out sequences, on all ranks: the layout does not enter. Bits per byte
    can be compared between tokenizers. A task with a head of its own has {corpus: {metric: value}} as `scores` instead
    of the latter, and its answers in RUN/predictions/CORPUS.jsonl.
    """

    def __init__(self, every: int, held_out_bytes: dict[str, int], scorers: Mapping[str, Scorer]):
        """held_out_bytes: of the text that the corpus's evaluated tokens stand for. scorers: by corpus."""
        self._scorers = scorers
        self._every = every
        self._bytes = held_out_bytes

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        if not run.held_out or not run.due(self._every) or record.get("rolled_back"):
            return
        record["held_out"], record["bits_per_byte"], record["scores"] = {}, {}, {}
        for name, batches in run.held_out.items():
            loss, tokens = run.engine.evaluate(batches)
            record["held_out"][name] = loss
            if self._bytes.get(name):
                record["bits_per_byte"][name] = loss * tokens / math.log(2) / self._bytes[name]
            if name in self._scorers:
                record["scores"][name] = self._score(run, name)
        for key in ("bits_per_byte", "scores"):
            if not record[key]:
                del record[key]

    def _score(self, run: Run, name: str) -> dict[str, float]:
        """The same on every rank."""
        scorer = self._scorers[name]
        logits = run.engine.predict(run.held_out[name])

        def score() -> dict[str, float]:
            answers = scorer.answers(logits)
            _write(run, name, answers)
            return scorer.task.score(answers)

        return run.groups.decide(score)


def _write(run: Run, name: str, answers: Sequence[Answer]) -> None:
    file = run.directory / "predictions" / f"{name.replace('/', '-').removesuffix('.jsonl')}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
