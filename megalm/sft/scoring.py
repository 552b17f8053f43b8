"""Scores of a held-out corpus: the logits of its rows, back to the lines that they came from, and to predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.examples import Rows
from megalm.sft.heads import HeadTask
from megalm.sft.read import read_rows
from megalm.sft.report import Prediction
from megalm.sft.task import Refused


class Scorer:
    """Of one corpus of a task with a head of its own."""

    def __init__(self, task: HeadTask, rows: Rows, chosen: np.ndarray) -> None:
        """rows: of one example set. chosen: those that are evaluated (data.loader.held_out_samples)."""
        self.kind = task.config.kind
        self.labels = task.labels
        self.score = task.score
        self._task = task
        [self._set] = rows.sets
        self._placed = [rows.examples_in(int(number)) for number in chosen]
        # Examples of one line stand behind one another: where each line's begin.
        origins = self._set.origins
        changes = np.flatnonzero((origins[1:] != origins[:-1]).any(axis=1)) + 1
        self._lines = [int(place) for place in (0, *changes, len(origins))]
        self._read: dict[tuple[int, int], Mapping[str, Any]] = {}

    def predictions(self, logits: Mapping[int, np.ndarray]) -> list[Prediction]:
        """What the model says to every line of which there is an example in the rows.

        logits: place in `chosen` -> [seq, classes] of that row (parallel.engine.Engine.predict).
        """
        found: dict[int, np.ndarray] = {}
        for place, computed in logits.items():
            found |= {number: computed[start:stop] for number, start, stop in self._placed[place]}
        width = next(iter(found.values())).shape[-1]
        nothing = np.zeros((0, width), np.float32)
        lines = [range(a, b) for a, b in zip(self._lines, self._lines[1:]) if any(n in found for n in range(a, b))]
        rows = self._rows([line[0] for line in lines])
        said = []
        for row, line in zip(rows, lines, strict=True):
            file, number = self._set.origin(line[0])
            prediction = self._task.predict(row, [found.get(number, nothing) for number in line])
            said.append(replace(prediction, file=file, row=number))
        return said

    def _rows(self, examples: Sequence[int]) -> list[Mapping[str, Any]]:
        """The rows that examples came from, read once."""
        places = [(int(file), int(row)) for file, row in self._set.origins[list(examples)]]
        for number in {file for file, row in places if (file, row) not in self._read}:
            wanted = {row for file, row in places if file == number}
            for line, row in read_rows(Path(self._set.files[number])):
                if line in wanted and not isinstance(row, Refused):
                    self._read[number, line] = row
        return [self._read[place] for place in places]
