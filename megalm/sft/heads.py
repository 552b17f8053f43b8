"""What tasks with a head of their own share: columns, classes, and predictions that can be scored."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from megalm.data.config import DataConfig
from megalm.data.examples import Example
from megalm.errors import MegalmError
from megalm.nn.config import HeadKind
from megalm.sft.config import TaskConfig
from megalm.sft.messages import Columns
from megalm.sft.read import Report, encoded, read_rows, row_files, row_word
from megalm.sft.report import Prediction
from megalm.sft.task import Refused
from megalm.tokenizer.base import Tokenizer


class HeadTask(ABC):
    """A kind of fine-tuning (sft.task.Task) that puts a head of classes in the place of the language model's."""

    head: ClassVar[HeadKind]
    columns: ClassVar[Mapping[str, str]]
    """What a row holds -> the usual name of its column."""

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, sequence_length: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.labels: list[str] = []
        """Names of the classes, by number; filled in once the rows can be read."""
        if unknown := sorted(set(config.columns) - set(self.columns)):
            raise MegalmError(
                f"task.columns names {unknown[0]}, and a row of {config.kind} has {', '.join(self.columns)}: name one "
                "of these"
            )

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"labels": self.labels, "problem_type": self.problem_type}

    @property
    def problem_type(self) -> str | None:
        """What transformers calls it, where a head serves several losses."""
        return None

    @abstractmethod
    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        """What the model learns from a row. An answer's place is where its label is."""

    @abstractmethod
    def shown(self, row: Mapping[str, Any]) -> str:
        """What the model reads, for a reader. Raises Refused for a row in which there is nothing to read."""

    @abstractmethod
    def names(self, row: Mapping[str, Any]) -> list[Any]:
        """The classes that a row names, as it writes them (class_name)."""

    @abstractmethod
    def predict(self, row: Mapping[str, Any], logits: Sequence[np.ndarray]) -> Prediction:
        """What logits [n, classes] of each of a row's examples say; n is shorter where the example was cut, and 0 where
        it was not evaluated."""

    @abstractmethod
    def score(self, said: Sequence[Prediction]) -> dict[str, float]:
        """Metric -> value, of at least one prediction."""

    def of(self, row: Mapping[str, Any]) -> Columns:
        return Columns(row, {**self.columns, **self.config.columns})

    def value(self, row: Mapping[str, Any], what: str) -> Any:
        """What a row holds as `what`, under the name that its column has. Raises Refused if it has none."""
        columns = self.of(row)
        found = columns.get(what)
        if found is None:
            raise Refused(f"no column {columns.name(what)}")
        return found

    def text(self, row: Mapping[str, Any], what: str) -> str:
        """A text that is not empty."""
        return self.of(row).text(what)

    def label(self, value: Any) -> int:
        """Number of the class that a row names, or gives the number of. Raises MegalmError if there is none."""
        name = str(value)
        if name in self.labels:
            return self.labels.index(name)
        if self.config.labels and isinstance(value, int) and 0 <= value < len(self.labels):
            return value
        where = "task.labels" if self.config.labels else "the classes of data.sources"
        raise MegalmError(
            f"the label {name!r} is none of {where} ({', '.join(self.labels)}): correct it, or name all in task.labels"
        )

    def find_labels(self, data: DataConfig) -> dict[str, str]:
        """Take the classes from task.labels, or else from all training rows, sorted; and say where each comes first.
        Raises MegalmError for too few."""
        found = dict.fromkeys(self.config.labels, "task.labels")
        if len(found) < len(self.config.labels):
            raise MegalmError("task.labels names a class twice: name each once")
        left_out = Report()
        if not found:
            for source in data.sources:
                for file in row_files(source.path):
                    where = f"{file} {row_word(file)}"
                    for number, row in read_rows(file):
                        try:
                            for name in self._named(row):
                                found.setdefault(name, f"{where} {number}")
                        except Refused as refused:
                            left_out.add(str(refused), f"{where} {number}")
        if len(found) < (1 if self.config.multi_label else 2):
            why = f"; left out: {left_out}" if str(left_out) else ""
            raise MegalmError(
                f"the rows of data.sources name {len(found)} classes ({', '.join(sorted(found)) or 'none'}{why}), and "
                "a classifier needs two: correct task.columns, or name them in task.labels"
            )
        self.labels = self.config.labels or sorted(found, key=_numbers_by_value)
        return found

    def _named(self, row: Mapping[str, Any] | Refused) -> list[str]:
        if isinstance(row, Refused):
            raise row
        encoded(row)
        self.shown(row)
        return [*map(str, self.names(row))]


def class_name(value: Any, what: str) -> str | int:
    """A class as a row writes it, its name or number. Raises Refused for what is neither. what: of the row it is."""
    if not isinstance(value, (str, int)):
        raise Refused(f"a {what} that is neither text nor a whole number")
    if isinstance(value, str) and not value.strip():
        raise Refused(f"an empty {what}")
    return value


def _numbers_by_value(name: str) -> tuple[int, str]:
    return int(name) if name.isdecimal() else -1, name
