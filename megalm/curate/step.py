"""The seam between a recipe and what it does to documents."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megalm.config import Config
from megalm.curate.document import Document, Rejection


class Step(ABC):
    """One verb over a batch of documents, in any process and any order: it keeps nothing from batch to batch."""

    kind: ClassVar[str]
    """Its name in a recipe."""
    Settings: ClassVar[type[Config]]
    """Its keys in a recipe, with defaults and a docstring for each (megalm.config.Config refuses unknown ones)."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def prepare(self) -> None:  # noqa: B027
        """Load models and compile loops, once in a process, before its first batch: so that the time this takes is not
        taken for the step's rate. Of a merging step: what sketch() needs."""

    def files(self) -> Sequence[str]:
        """Files that decide what the step does, such as lists and models: a run that goes on must find them as they
        were."""
        return ()

    @abstractmethod
    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        """Change documents in place (text, metadata); why each is rejected, or None where it goes on."""

    def measure(self, document: Document) -> dict[str, float]:
        """Numbers of a document whose distribution the audit draws; by name."""
        return {}


class ByDocument(Step):
    """A step that looks at each document by itself."""

    @abstractmethod
    def verdict(self, document: Document) -> Rejection | None:
        """apply(), of one document."""

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        return [self.verdict(document) for document in documents]


class Merging(Step):
    """A step that must see all documents before it decides: sketch each batch, merge all sketches once, then apply."""

    @abstractmethod
    def sketch(self, documents: Sequence[Document]) -> bytes:
        """What merge() needs of a batch; sketches of a task are written one behind the other."""

    @abstractmethod
    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        """From the sketch files of all tasks, in order, to verdicts below the folder `verdicts`, in bounded memory;
        what there is to say of it, for the audit."""

    @abstractmethod
    def judge(self, verdicts: Path) -> None:
        """Open the verdicts, before apply()."""
