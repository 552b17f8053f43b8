"""What flows through a recipe: documents, and why some of them are left behind."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Document:
    """A text and what is known of it. id: unique over a recipe's sources, and the same in every run."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain values: url, source, language, scores. Steps add to it."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """reason: a few words, the same for all documents it befalls (`too short`), by which they are counted. detail: of
    this one (`12 words`)."""

    reason: str
    detail: str = ""
