"""Steps of a few lines, to try what runs them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveInt

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Merging, Step


class LongEnoughSettings(Config):
    """Of LongEnough."""

    characters: PositiveInt = 30
    """Fewer are too short."""


class LongEnough(Step):
    """Strips a text, and leaves short ones behind."""

    kind: ClassVar[str] = "long_enough"
    Settings: ClassVar[type[Config]] = LongEnoughSettings

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        for document in documents:
            document.text = document.text.strip()
        return [
            Rejection("too short", f"{len(each.text)} characters")
            if len(each.text) < self.settings.characters
            else None
            for each in documents
        ]

    def measure(self, document: Document) -> dict[str, float]:
        return {"spaces": document.text.count(" ") / max(len(document.text), 1)}


class NoSettings(Config):
    """None."""


class FirstOnly(Merging):
    """Of documents with the same text, keeps the first."""

    kind: ClassVar[str] = "first_only"
    Settings: ClassVar[type[Config]] = NoSettings

    def sketch(self, documents: Sequence[Document]) -> bytes:
        hashes = [hashlib.sha256(each.text.encode()).hexdigest() for each in documents]
        return "".join(f"{digest} {each.id}\n" for digest, each in zip(hashes, documents)).encode()

    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        sizes = Counter[str]()
        repeated = []
        for path in sketches:
            for line in path.read_text().splitlines():
                digest, identity = line.split(" ", 1)
                if sizes[digest]:
                    repeated.append(identity)
                sizes[digest] += 1
        (verdicts / "repeated").write_text("\n".join(repeated))
        return {"documents": sizes.total(), "cluster_sizes": {str(k): v for k, v in Counter(sizes.values()).items()}}

    def judge(self, verdicts: Path) -> None:
        self.repeated = {*(verdicts / "repeated").read_text().split("\n")}

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        return [Rejection("repeated") if each.id in self.repeated else None for each in documents]


class Spoil(Step):
    """Gives documents metadata that are no Unicode."""

    kind: ClassVar[str] = "spoil"
    Settings: ClassVar[type[Config]] = NoSettings

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        for document in documents:
            document.metadata["title"] = "\ud800"
        return [None] * len(documents)


class Fragile(Step):
    """Breaks on the text `poison`."""

    kind: ClassVar[str] = "fragile"
    Settings: ClassVar[type[Config]] = NoSettings

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        for document in documents:
            if "poison" in document.text:
                raise ZeroDivisionError("this text cannot be borne")
        return [None] * len(documents)


def merged(step: Merging, documents: Sequence[Document], folder: Path, files: int, batch: int) -> tuple[Any, dict]:
    """A step as another process opens it, after a merge of sketches from several tasks in small batches; and what the
    merge said. Verdicts are in folder/verdicts."""
    paths = []
    for number in range(files):
        task = documents[number * len(documents) // files : (number + 1) * len(documents) // files]
        path = folder / f"sketch-{number}"
        path.write_bytes(b"".join(step.sketch(task[begin : begin + batch]) for begin in range(0, len(task), batch)))
        paths.append(path)
    (folder / "verdicts").mkdir()
    told = step.merge(paths, folder / "verdicts")
    other = type(step)(step.settings)
    other.judge(folder / "verdicts")
    return other, told
