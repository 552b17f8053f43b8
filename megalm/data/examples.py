"""Fine-tuning examples as rows: packed without contamination, or one in each row.

A row is one or more examples, each a segment of its own with positions from 0, then padding, which is a segment too
and has weight 0. So no position sees another example, and none is trained on what attention cannot see.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megalm.data.batch import Batch
from megalm.data.mixture import Blended, ByLength, Mixture
from megalm.data.samples import Order
from megalm.errors import MegalmError

Arrangement = Literal["packed", "padded", "sorted"]


@dataclass(frozen=True)
class Example:
    """What a model reads and what it should say there; n positions."""

    ids: np.ndarray
    """[n] ids the model reads."""
    labels: np.ndarray
    """[n] what each position should say: the next id for a language model (already shifted), a class for a head.
    Or [trained, labels], several for each position that is trained: a thousand classes for every token would be a
    thousand times the text."""
    weights: np.ndarray
    """[n] 1 where a position is trained, else 0."""

    def cut(self, length: int) -> "Example":
        """Its first `length` positions."""
        weights = self.weights[:length]
        labels = length if self.labels.ndim == 1 else np.count_nonzero(weights)
        return Example(self.ids[:length], self.labels[:labels], weights)

    def compact(self) -> "Example":
        """As ExampleSet holds it, and nothing beside (sft.task.Shortened knows the whole row)."""
        ids, labels = (each.astype(np.int32, order="C", copy=False) for each in (self.ids, self.labels))
        return Example(ids, labels, self.weights.astype(np.uint8, order="C", copy=False))

    @property
    def placed_labels(self) -> np.ndarray:
        """[n] or [n, labels]: those of each position; 0 for one that is not trained and has none of its own."""
        if self.labels.ndim == 1:
            return self.labels
        placed = np.zeros((len(self.ids), self.labels.shape[1]), self.labels.dtype)
        placed[np.flatnonzero(self.weights)] = self.labels
        return placed


@dataclass(frozen=True)
class ExampleSet:
    """Examples behind one another in flat arrays, which may lie on disk; `tokens` positions in all."""

    ids: np.ndarray
    """[tokens] int32."""
    labels: np.ndarray
    """[tokens] or [trained, labels] int32."""
    weights: np.ndarray
    """[tokens] uint8."""
    offsets: np.ndarray
    """[examples + 1] where each example begins, int64."""
    origins: np.ndarray
    """[examples, 2] number of the file an example came from, and its row there, from 1; int64."""
    files: Sequence[str]
    report: str
    """What was read and what was left out, for the log."""
    fingerprint: str
    """Hash of the content, in this order."""

    @staticmethod
    def of(examples: Iterable[tuple[Example, int, int]], files: Sequence[str], report: str = "") -> "ExampleSet":
        """examples: each with the number of its file in `files` and its row there, from 1; at least one."""
        found = [(example.compact(), file, row) for example, file, row in examples]
        offsets = np.cumsum([0, *(len(example.ids) for example, *_ in found)], dtype=np.int64)
        ids, labels, weights = (
            np.concatenate([getattr(example, name) for example, *_ in found]) for name in ("ids", "labels", "weights")
        )
        origins = np.array([place for _, *place in found], np.int64)
        digest = hashlib.sha256(repr(labels.shape[1:]).encode())
        digest.update(ids.data)
        for example, *_ in found:  # placed, as all labels once were kept: checkpoints hold this hash
            digest.update(example.placed_labels.data)
        digest.update(weights.data)
        digest.update(offsets.data)
        return ExampleSet(ids, labels, weights, offsets, origins, list(files), report, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Example:
        here, bounds = slice(self.offsets[number], self.offsets[number + 1]), self._label_offsets
        return Example(self.ids[here], self.labels[bounds[number] : bounds[number + 1]], self.weights[here])

    @cached_property
    def _label_offsets(self) -> np.ndarray:
        """[examples + 1] where the labels of each example begin."""
        return self.offsets if self.labels.ndim == 1 else np.searchsorted(np.flatnonzero(self.weights), self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """[examples] positions of each."""
        return np.diff(self.offsets)

    def origin(self, number: int) -> tuple[str, int]:
        """The file and the row there, from 1, that an example came from."""
        file, row = self.origins[number]
        return self.files[file], int(row)

    def save(self, folder: Path) -> None:
        """Write the arrays; the folder appears when it is whole. Raises MegalmError if it cannot be written."""
        partial = folder.with_name(folder.name + ".partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in _ARRAYS:
                np.save(partial / f"{name}.npy", getattr(self, name))
            about = {"files": self.files, "report": self.report, "fingerprint": self.fingerprint}
            (partial / _ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as error:
            raise MegalmError(
                f"cannot write the examples to {folder} ({error.strerror}): make room there, or choose another "
                "run.directory"
            ) from error

    @staticmethod
    def load(folder: Path) -> "ExampleSet":
        """Read what save() wrote, as maps of the files. Raises MegalmError if it is damaged."""
        try:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
            return ExampleSet(**arrays, **json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise MegalmError(f"the examples in {folder} are damaged ({error}): remove that folder") from error


_ARRAYS = ("ids", "labels", "weights", "offsets", "origins")
_ABOUT = "about.json"


class Rows:
    """The samples of example sets (data.samples.Samples): rows of examples."""

    def __init__(
        self,
        sets: Sequence[ExampleSet],
        weights: Sequence[float],
        *,
        sequence_length: int,
        pad_id: int,
        arrangement: Arrangement,
        global_batch_size: int,
        facts: Mapping[str, Any],
        fixed_length: bool = False,
        multiple: int = 1,
        augment: Callable[[np.ndarray, int, int], np.ndarray] | None = None,
    ) -> None:
        """Arrange the examples.

        Args:
            sets: no example is longer than sequence_length.
            weights: the share of each set.
            sequence_length: S, the longest row.
            pad_id: fills a row behind its examples.
            arrangement: `packed`, several in a row; `padded`, one; `sorted`, one, and rows of like length together.
            global_batch_size: sequences of a step, within which sorted rows are alike.
            facts: what, beside content and arrangement, a resumed run must find again.
            fixed_length: batches are [rows, S], as pipelines need; packed ones always are. Otherwise they are as long
                as their longest example,
            multiple: rounded up to a multiple of this, which divides S.
            augment: what the model reads in place of an example's ids, given also the sample's number and the place in
                its row where the example begins.
        """
        self.sets = list(sets)
        self._length = sequence_length
        self._pad_id = pad_id
        self._fixed_length = fixed_length
        self._fixed = fixed_length or arrangement == "packed"
        self._multiple = multiple
        self._augment = augment
        self._sorted = arrangement == "sorted"
        self._batch = global_batch_size
        # Of each set: the examples row by row, and where each row begins among them.
        self._rows = [
            pack(each.lengths, sequence_length)
            if arrangement == "packed"
            else (np.arange(len(each)), np.arange(len(each) + 1))
            for each in sets
        ]
        self.corpora = [
            Blended(hashlib.sha256(f"{each.fingerprint} {arrangement}".encode()).hexdigest(), len(starts) - 1, weight)
            for each, (_, starts), weight in zip(self.sets, self._rows, weights, strict=True)
        ]
        self.facts = {"sequence_length": sequence_length, **facts}
        if self._sorted:
            self.facts["sorted_by"] = global_batch_size

    def one_each(self, examples: Iterable[Example]) -> "Rows":
        """Other examples as rows of their own, which are as long as these may be."""
        found = ExampleSet.of(((example, 0, number) for number, example in enumerate(examples, 1)), [""])
        return Rows(
            [found],
            [1.0],
            sequence_length=self._length,
            pad_id=self._pad_id,
            arrangement="padded",
            global_batch_size=self._batch,
            facts={},
            fixed_length=self._fixed_length,
            multiple=self._multiple,
        )

    def order(self, seed: int, shuffle: bool) -> Order:
        mixture = Mixture(self.corpora, seed, shuffle)
        return ByLength(mixture, [each.lengths for each in self.sets], self._batch, seed) if self._sorted else mixture

    def examples_in(self, number: int, corpus: int = 0) -> list[tuple[int, int, int]]:
        """The examples of a row: (number in its set, start, stop) with the positions it takes there."""
        members, starts = self._rows[corpus]
        here = members[starts[number] : starts[number + 1]]
        stops = np.cumsum(self.sets[corpus].lengths[here])
        return [(int(e), int(stop - n), int(stop)) for e, stop, n in zip(here, stops, self.sets[corpus].lengths[here])]

    def batch(self, rows: Sequence[tuple[int, int] | None], sample_ids: np.ndarray) -> Batch:
        """A batch of one row (set, number) each; None is a row of padding, masked throughout.

        Labels are [rows, length], or [rows, length, labels] where several classes may be true.
        """
        placed = [self.examples_in(row[1], row[0]) if row else [] for row in rows]
        length = self._length
        if not self._fixed:
            longest = max((examples[-1][2] for examples in placed if examples), default=1)
            length = -(-longest // self._multiple) * self._multiple
        shape = (len(rows), length)
        tokens = np.full(shape, self._pad_id, np.int64)
        labels = np.zeros((*shape, *self.sets[0].labels.shape[1:]), np.int64)
        mask = np.zeros(shape, np.float32)
        segments, positions = np.zeros(shape, np.int64), np.empty(shape, np.int64)
        for place, (row, sample, examples) in enumerate(zip(rows, sample_ids, placed)):
            end = 0
            for segment, (number, start, end) in enumerate(examples):
                assert row is not None
                example = self.sets[row[0]][number]
                ids = example.ids if self._augment is None else self._augment(example.ids, int(sample), start)
                tokens[place, start:end] = ids
                labels[place, start:end] = example.placed_labels
                mask[place, start:end] = example.weights
                segments[place, start:end] = segment
                positions[place, start:end] = np.arange(end - start)
            segments[place, end:] = len(examples)
            positions[place, end:] = np.arange(length - end)
        return Batch(tokens, labels, mask, segments, positions, np.asarray(sample_ids, np.int64))


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples as few rows: longest first, each into the row with the least room that it fits in (best-fit decreasing).

    Args:
        lengths: [examples] in 1..capacity.

    Returns:
        The examples row by row [examples], and where each row begins among them [rows + 1]. Rows stand in the order of
        their first example, and examples in a row in their own.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if by_room[r] has rows
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(example)
        else:
            room, row = capacity, len(rows)
            rows.append([example])
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    rows = sorted(map(sorted, rows))
    members = np.array([example for row in rows for example in row], np.int64)
    return members, np.cumsum([0, *map(len, rows)], dtype=np.int64)
