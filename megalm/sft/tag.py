"""Token classification: a tag for each word, of entities for the most part (IOB2: B-PER, I-PER, O).

Words are encoded one by one, with a space before each where its script has one. A tag is read at a word's last token,
or at its first (task.tag_at).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megalm.data.config import DataConfig
from megalm.data.examples import Example
from megalm.sft import metrics
from megalm.sft.config import TaskConfig
from megalm.sft.heads import HeadTask, class_name
from megalm.sft.report import Prediction
from megalm.sft.task import Refused
from megalm.tokenizer.base import Tokenizer

OUTSIDE = "O"
_UNSPACED = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
"""Characters that no space stands beside: Chinese and Japanese, and their punctuation."""


class TokenClassification(HeadTask):
    """Rows of tokens (words) and tags, lists of one length; tags are names, or numbers of task.labels."""

    head = "token_classification"
    columns = {"tokens": "tokens", "tags": "tags"}

    def names(self, row: Mapping[str, Any]) -> list[Any]:
        tags = self.value(row, "tags")
        if not isinstance(tags, list):
            raise Refused("tags are no list")
        return [class_name(tag, "tag") for tag in tags]

    def shown(self, row: Mapping[str, Any]) -> str:
        return " ".join(self.words(row))

    def words(self, row: Mapping[str, Any]) -> list[str]:
        words, tags = self.value(row, "tokens"), self.names(row)
        if not (isinstance(words, list) and words):
            raise Refused("tokens are no list" if words else "no tokens")
        if len(words) != len(tags):
            raise Refused("as many tags as tokens are needed")
        if not all(isinstance(word, str) and word for word in words):
            raise Refused("an empty token")
        return words

    def place(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of words, and the position where each word's tag is read."""
        spaced = [
            word if number == 0 or _UNSPACED.match(word) or _UNSPACED.match(words[number - 1][-1]) else f" {word}"
            for number, word in enumerate(words)
        ]
        ids, places = [*self.tokenizer.begins], []
        for word in self.tokenizer.encode_batch(spaced):
            if not word:
                raise Refused("a token that the tokenizer has no ids for")
            places.append(len(ids) + (len(word) - 1 if self.config.tag_at == "last" else 0))
            ids += word
        return ids, places

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        ids, places = self.place(self.words(row))
        labels, weights = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.uint8)
        labels[places] = [self.label(tag) for tag in self.names(row)]
        weights[places] = 1
        return [Example(np.array(ids), labels, weights)]

    def predict(self, row: Mapping[str, Any], logits: Sequence[np.ndarray]) -> Prediction:
        words, [scores] = self.words(row), logits
        _, places = self.place(words)
        # Words that were cut off were not read: they are nothing.
        said = [self.labels[int(scores[place].argmax())] if place < len(scores) else OUTSIDE for place in places]
        return Prediction(self.shown(row), [self.labels[self.label(tag)] for tag in self.names(row)], said)

    def score(self, said: Sequence[Prediction]) -> dict[str, float]:
        return metrics.entities([a.reference for a in said], [a.prediction for a in said])


def open_tagging(
    config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int
) -> TokenClassification:
    task = TokenClassification(config, tokenizer, sequence_length)
    for tag, place in task.find_labels(data).items():
        metrics.require_iob2(tag, place)
    return task
