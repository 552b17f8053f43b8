"""Question answering: the answer is a span of a context.

Ids are what begins a document, the question, what ends a document, and the context; a context that is too long is read
in windows that overlap. A window that does not hold the answer has it at its first position, which means none. Answers
go back to text by the bytes that ids stand for, so the tokenizer must keep every byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megalm.data.config import DataConfig
from megalm.data.examples import Example
from megalm.sft import metrics
from megalm.sft.config import TaskConfig
from megalm.sft.heads import HeadTask
from megalm.sft.report import Prediction
from megalm.sft.task import Refused
from megalm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Window:
    """ids [n] of question and a part of the context; first: position of that part. spans [n - first, 2]: characters
    [begin, end) of the context that its tokens stand for."""

    ids: list[int]
    first: int
    spans: np.ndarray


class QuestionAnswering(HeadTask):
    """Rows of question, context and answers: {text: [...], answer_start: [...]} as SQuAD has it, or a list of {text,
    answer_start}. answer_start, a character, may be left out; the first answer is trained, any is right."""

    head = "question_answering"
    columns = {"question": "question", "context": "context", "answers": "answers"}

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, sequence_length: int) -> None:
        super().__init__(config, tokenizer, sequence_length)
        self.labels = ["start", "end"]

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.array(self.tokenizer.byte_counts())

    def names(self, row: Mapping[str, Any]) -> list[Any]:
        return []

    def shown(self, row: Mapping[str, Any]) -> str:
        return f"{self.text(row, 'question')}\n{self.text(row, 'context')}"

    def answers(self, row: Mapping[str, Any], context: str) -> list[tuple[int, int, str]]:
        """(begin, end, text) of the accepted answers, in characters of the context."""
        given = self.of(row).get("answers")
        texts, starts = _texts_and_starts([] if given is None else given)
        found = []
        for text, start in zip(texts, starts, strict=True):
            if start is None or context[start : start + len(text)] != text:
                start = context.find(text)
            if start < 0 or not text:
                raise Refused("an answer that is not in its context")
            found.append((start, start + len(text), text))
        if not found and not self.config.unanswerable:
            raise Refused("no answer")
        return found

    def windows(self, question: str, context: str) -> list[Window]:
        asked, ids = self.tokenizer.encode_batch([question, context])
        before = self.tokenizer.begins + asked + [self.tokenizer.eos_id]
        room = self.sequence_length - len(before)
        shared = self.config.stride or room // 4
        if room < 2 or shared >= room:
            raise Refused(f"a question that leaves no room for its context in {self.sequence_length} tokens")
        spans = self._spans(ids, context)
        starts = range(0, max(len(ids) - shared, 1), room - shared)
        return [Window(before + ids[s : s + room], len(before), spans[s : s + room]) for s in starts]

    def _spans(self, ids: Sequence[int], text: str) -> np.ndarray:
        """Characters [begin, end) of every id, [n, 2]."""
        ends = self._bytes[np.array(ids, np.int64)].cumsum()
        character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])  # of each byte
        if not len(ids) or ends[-1] != len(character):
            raise Refused("a context that the tokenizer does not keep byte for byte")
        begins = np.concatenate(([0], ends[:-1]))
        return np.stack((character[np.minimum(begins, len(character) - 1)], character[np.maximum(ends - 1, 0)] + 1), -1)

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        context = self.text(row, "context")
        answers = self.answers(row, context)
        return [self._example(window, answers) for window in self.windows(self.text(row, "question"), context)]

    def _example(self, window: Window, answers: Sequence[tuple[int, int, str]]) -> Example:
        """Its labels stand at its first position (nn.loss.span_loss)."""
        begin = end = 0
        if answers:
            start, stop, _ = answers[0]
            within = np.flatnonzero((window.spans[:, 1] > start) & (window.spans[:, 0] < stop))
            if len(within) and window.spans[within[0], 0] <= start and window.spans[within[-1], 1] >= stop:
                begin, end = window.first + within[0], window.first + within[-1]
        weights = np.zeros(len(window.ids), np.uint8)
        weights[0] = 1
        return Example(np.array(window.ids), np.array([(begin, end, len(window.ids))]), weights)

    def predict(self, row: Mapping[str, Any], logits: Sequence[np.ndarray]) -> Prediction:
        context, question = self.text(row, "context"), self.text(row, "question")
        best, said = -np.inf, ""
        for window, scores in zip(self.windows(question, context), logits, strict=True):
            if not len(scores):
                continue
            score, begin, end = best_span(scores, window.first, self.config.longest_answer)
            if score > best:
                best = score
                said = context[window.spans[begin, 0] : window.spans[end, 1]].strip()
        if self.config.unanswerable and best < 0:
            said = ""
        return Prediction(self.shown(row), [text for _, _, text in self.answers(row, context)], said)

    def score(self, said: Sequence[Prediction]) -> dict[str, float]:
        return metrics.span_answers([a.reference for a in said], [a.prediction for a in said])


def best_span(logits: np.ndarray, first: int, longest: int) -> tuple[float, int, int]:
    """The likeliest span of a window's context, of up to `longest` tokens, from logits [n, 2] of begin and end.

    Returns how much likelier it is than no answer (the sum of its two logits above that of the first position's, which
    makes windows comparable), and its first and last token, counted from the context's.
    """
    begin, end = logits[first:].T
    total = begin[:, None] + end[None, :]
    allowed = np.triu(np.ones_like(total, bool)) & ~np.triu(np.ones_like(total, bool), longest)
    place = int(np.where(allowed, total, -np.inf).argmax())
    begins, ends = divmod(place, len(end))
    return float(total[begins, ends] - logits[0].sum()), begins, ends


def _texts_and_starts(value: Any) -> tuple[list[str], list[int | None]]:
    if isinstance(value, dict):
        texts = value.get("text")
        starts = value.get("answer_start") or ([None] * len(texts) if isinstance(texts, list) else None)
    elif isinstance(value, list) and all(isinstance(each, dict) for each in value):
        texts, starts = [each.get("text") for each in value], [each.get("answer_start") for each in value]
    else:
        raise Refused("answers are neither {text, answer_start} nor a list of them")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise Refused("as many answer_start as answers are needed")
    if not all(isinstance(text, str) for text in texts) or not all(
        start is None or type(start) is int for start in starts
    ):
        raise Refused("an answer that is no text, or starts at no number")
    return texts, starts


def open_question_answering(
    config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int
) -> QuestionAnswering:
    return QuestionAnswering(config, tokenizer, sequence_length)
