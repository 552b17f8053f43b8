"""Scores of a held-out corpus whose answers are text: the model writes them, and they are held against the rows'."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from megalm.data.batch import Batch
from megalm.data.examples import Example, Rows
from megalm.data.loader import held_out_batches
from megalm.sft import metrics
from megalm.sft.config import TaskKind
from megalm.sft.report import Prediction
from megalm.sft.text import ConversationTask
from megalm.tokenizer.base import Tokenizer

NextTokens = Callable[[Sequence[Batch]], Mapping[int, int]]
"""The likeliest id behind the position that each row's mask marks, by sample id (Engine.next_tokens)."""

SCORES: Mapping[TaskKind, tuple[Callable[[Sequence[str], Sequence[str]], Mapping[str, float]], ...]] = {
    "summarization": (metrics.rouge,),
    "translation": (metrics.bleu_chrf,),
    "dialogue": (metrics.bleu_chrf, metrics.rouge),
    "chat": (metrics.bleu_chrf, metrics.rouge),
}
"""What the field scores a kind's answers by."""


class Answers:
    """Of one corpus: the last answer of every example in the rows that are evaluated, written greedily.

    Each token takes a pass over the prompts that are not answered yet, with nothing remembered of the last: slower than
    megalm.eval.generate, and possible under every layout that trains.
    """

    labels: Sequence[str] = ()

    def __init__(
        self,
        kind: TaskKind,
        task: ConversationTask,
        rows: Rows,
        chosen: np.ndarray,
        *,
        rank: int,
        size: int,
        micro_batch_size: int,
        sequence_length: int,
        max_new_tokens: int,
    ) -> None:
        """rows: of one example set. chosen: those that are evaluated (data.loader.held_out_samples). rank, size: data-
        parallel coordinates. max_new_tokens: of an answer; one that reaches sequence_length ends there too."""
        self.kind = kind
        self._tokenizer: Tokenizer = task.chat.tokenizer
        self._ends = {self._tokenizer.eos_id, *task.chat.ends}
        [self._set] = rows.sets
        numbers = [number for row in chosen for number, _, _ in rows.examples_in(int(row))]
        self._asked = [(number, *prompt_and_answer(self._set[number], self._ends)) for number in numbers]
        self._rows, self._length, self._most = rows, sequence_length, max_new_tokens
        self._share = {"rank": rank, "size": size, "micro_batch_size": micro_batch_size}

    def write(self, next_tokens: NextTokens) -> list[list[int]]:
        """The ids of every answer, without what ends it; the same on all ranks, which all call it."""
        texts = [list(prompt) for _, prompt, _ in self._asked]
        active = list(range(len(texts)))
        for _ in range(self._most):
            active = [place for place in active if len(texts[place]) <= self._length]
            if not active:
                break
            chosen = next_tokens(list(self._batches([texts[place] for place in active])))
            said = {place: chosen[number] for number, place in enumerate(active)}
            active = [place for place in active if said[place] not in self._ends]
            for place in active:
                texts[place].append(said[place])
        return [text[len(prompt) :] for text, (_, prompt, _) in zip(texts, self._asked, strict=True)]

    def predictions(self, written: Sequence[Sequence[int]]) -> list[Prediction]:
        """What was asked, what is right, and what the model wrote."""
        decode = self._tokenizer.decode
        found = []
        for (number, prompt, answer), ids in zip(self._asked, written, strict=True):
            file, row = self._set.origin(number)
            right = [i for i in answer if i not in self._ends]
            found.append(
                Prediction(decode(prompt), decode(right).strip(), decode(list(ids)).strip(), file=file, row=row)
            )
        return found

    def score(self, said: Sequence[Prediction]) -> dict[str, float]:
        references, predictions = [each.reference for each in said], [each.prediction for each in said]
        return {name: value for score in SCORES[self.kind] for name, value in score(references, predictions).items()}

    def _batches(self, texts: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """This rank's share of rows of one text each, whose mask has the text's last position; sample ids are places in
        `texts`."""

        def ended(text: Sequence[int]) -> Example:
            weights = np.zeros(len(text), np.uint8)
            weights[-1] = 1
            return Example(np.array(text), np.zeros(len(text), np.int64), weights)

        rows = self._rows.one_each(map(ended, texts))
        return held_out_batches(rows, **self._share, sequences=len(texts))


def prompt_and_answer(example: Example, ends: Collection[int]) -> tuple[list[int], list[int]]:
    """The ids up to where the last answer begins, of one at least, and the answer's: the last trained stretch, or what
    stands in it behind the last of `ends` but its own (a template may put nothing between two answers)."""
    trained = np.flatnonzero(example.weights)
    stop = int(trained[-1]) + 1
    untrained = np.flatnonzero(example.weights[:stop] == 0)
    start = int(untrained[-1]) + 1 if len(untrained) else 0
    earlier = np.flatnonzero(np.isin(example.labels[start : stop - 1], list(ends)))
    start += int(earlier[-1]) + 1 if len(earlier) else 0
    return example.ids[: start + 1].tolist(), example.labels[start:stop].tolist()
