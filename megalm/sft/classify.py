"""Tasks that put a text, a pair of texts, or a pair of entities in a text into a class.

Ids are what begins a document, then the text; its last token is where the class is read, as transformers' models for
sequence classification have it. Between two texts stands what ends a document.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megalm.data.config import DataConfig
from megalm.data.examples import Example
from megalm.sft import metrics
from megalm.sft.config import TaskConfig
from megalm.sft.heads import HeadTask, class_name
from megalm.sft.report import Prediction
from megalm.sft.task import Refused, Shortened
from megalm.tokenizer.base import Tokenizer

Ids = Callable[[int], list[int]]
"""The ids of a row, in so many at most."""
WHOLE = 2**31


class TextClassification(HeadTask):
    """Rows of text and label; with multi_label, label is a list of any number of them."""

    head = "sequence_classification"
    columns = {"text": "text", "label": "label"}

    @property
    def problem_type(self) -> str:
        return "multi_label_classification" if self.config.multi_label else "single_label_classification"

    def names(self, row: Mapping[str, Any]) -> list[Any]:
        value, several = self.value(row, "label"), self.config.multi_label
        if isinstance(value, list) != several:
            raise Refused("label is no list" if several else "label is a list, and task.multi_label is not set")
        return [class_name(each, "label") for each in (value if several else [value])]

    def ids(self, row: Mapping[str, Any]) -> Ids:
        whole = self.tokenizer.begins + self.tokenizer.encode(self.text(row, "text"))
        return lambda length: whole[:length]

    def shown(self, row: Mapping[str, Any]) -> str:
        return self.text(row, "text")

    def numbers(self, row: Mapping[str, Any]) -> list[int]:
        """Of the classes that a row names, each once, in order."""
        return sorted({self.label(name) for name in self.names(row)})

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        ids, numbers = self.ids(row), self.numbers(row)

        def example(length: int) -> Example:
            here = np.array(ids(length))
            labels = np.zeros((1, len(self.labels)) if self.config.multi_label else len(here), np.int64)
            if self.config.multi_label:
                labels[-1, numbers] = 1
            else:
                labels[-1] = numbers[0]
            weights = np.zeros(len(here), np.uint8)
            weights[-1] = 1
            return Example(here, labels, weights)

        whole = example(WHOLE)
        return [Shortened(whole.ids, whole.labels, whole.weights, example)]

    def predict(self, row: Mapping[str, Any], logits: Sequence[np.ndarray]) -> Prediction:
        last = logits[0][-1]
        true = [self.labels[i] for i in self.numbers(row)]
        if self.config.multi_label:
            return Prediction(self.shown(row), true, [self.labels[i] for i in np.flatnonzero(last > 0)])
        likely = np.exp(last - last.max())
        likely /= likely.sum()
        chosen, right = int(likely.argmax()), self.labels.index(true[0])
        return Prediction(
            self.shown(row),
            true[0],
            self.labels[chosen],
            confidence=float(likely[chosen]),
            loss=float(-np.log(max(likely[right], np.finfo(np.float32).tiny))),
        )

    def score(self, said: Sequence[Prediction]) -> dict[str, float]:
        scores = metrics.multi_label if self.config.multi_label else metrics.classification
        return scores([a.reference for a in said], [a.prediction for a in said], self.labels)


class PairClassification(TextClassification):
    """Rows of two texts and label: does one follow from the other, do they say the same, does one answer the other."""

    columns = {"first": "sentence1", "second": "sentence2", "label": "label"}

    def ids(self, row: Mapping[str, Any]) -> Ids:
        first, second = self.tokenizer.encode_batch([self.text(row, "first"), self.text(row, "second")])
        begin = self.tokenizer.begins

        def at(length: int) -> list[int]:
            """The longer text gives way, down to the length of the other."""
            room = max(length - len(begin) - 1, 2)
            kept = min(len(second), max(room - len(first), room // 2))
            return begin + first[: room - kept] + [self.tokenizer.eos_id] + second[:kept]

        return at

    def shown(self, row: Mapping[str, Any]) -> str:
        return f"{self.text(row, 'first')}\n{self.text(row, 'second')}"


class RelationExtraction(TextClassification):
    """Rows of a text in which two entities are marked, and the label of what one is to the other.

    The marks stand in the text; or the row has the characters [begin, end) of both entities as subject and object, and
    the marks are put around them.
    """

    columns = {"text": "text", "label": "label", "subject": "subject", "object": "object"}

    def shown(self, row: Mapping[str, Any]) -> str:
        text, marks = self.text(row, "text"), self.config.markers
        spans = [*map(self.of(row).get, ("subject", "object"))]
        if spans != [None, None]:
            places = [_place(span, text) for span in spans]
            (_, end), (begin, _) = sorted(places)
            if end > begin:
                raise Refused("entities that overlap")
            # The later one first, so that the other's place stays as it is.
            for (begin, end), (opening, closing) in sorted(zip(places, (marks[:2], marks[2:])), reverse=True):
                text = f"{text[:begin]}{opening}{text[begin:end]}{closing}{text[end:]}"
        if any(text.count(mark) != 1 for mark in marks):
            raise Refused("entities that are not marked once each")
        return text

    def ids(self, row: Mapping[str, Any]) -> Ids:
        text, marks = self.shown(row), self.config.markers
        begin, body, places = self.tokenizer.begins, list[int](), list[int]()
        for part in re.split("|".join(f"({re.escape(mark)})" for mark in marks), text):
            if part in marks:
                places.append(len(body))
                control = self.tokenizer.special_tokens.get(part)
                body += self.tokenizer.encode(part) if control is None else [control]
                places.append(len(body))
            elif part:
                body += self.tokenizer.encode(part)

        def at(length: int) -> list[int]:
            """Both entities stay, and as much on either side of them."""
            room = max(length - len(begin), 1)
            spare = max(room - (places[-1] - places[0]), 0)
            start = max(0, min(places[0] - spare // 2, len(body) - room))
            return begin + body[start : start + room]

        return at

    def score(self, said: Sequence[Prediction]) -> dict[str, float]:
        none = self.config.none_label
        found = [[[each] if each != none else [] for each in (a.reference, a.prediction)] for a in said]
        return super().score(said) | metrics.relations([true for true, _ in found], [said for _, said in found])


def _place(span: Any, text: str) -> tuple[int, int]:
    """Characters [begin, end) of an entity, as a row gives them. Raises Refused if that is no place in the text."""
    if not (isinstance(span, list) and [*map(type, span)] == [int, int] and 0 <= span[0] < span[1] <= len(text)):
        raise Refused("entities that are not two places in the text")
    return span[0], span[1]


def open_classification(
    kind: type[TextClassification], config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int
) -> TextClassification:
    task = kind(config, tokenizer, sequence_length)
    task.find_labels(data)
    return task
