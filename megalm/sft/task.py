"""The seam between rows of data and the trainer: what every kind of fine-tuning says of itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megalm.data.examples import Example


class Refused(Exception):
    """A row that cannot be trained on, and why, in a few words; it is counted under them and left out."""


@dataclass(frozen=True)
class Shortened(Example):
    """An example that knows what it can do without: `at` gives the one of so many positions."""

    at: Callable[[int], Example]

    def cut(self, length: int) -> Example:
        return self.at(length)


class Task(Protocol):
    """A kind of fine-tuning, made for one config and one tokenizer."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What beside the config and the tokenizer fixes its examples (the content of a template, say); plain values,
        kept in checkpoints."""
        ...

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        """What the model learns from a row: one example, or several where a row is cut into windows.

        Raises Refused for a row that says nothing (an empty answer, a missing column, an unknown label).
        """
        ...
