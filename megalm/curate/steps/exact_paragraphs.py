"""Paragraphs or lines that an earlier document has already are cut out: menus, notices, quoted news."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Merging
from megalm.curate.steps.records import Groups, Verdicts, check_whole, id_hash, read

_SKETCH = np.dtype([("content", "<u8"), ("id", "<u8"), ("index", "<u4")])
_VERDICT = np.dtype([("id", "<u8"), ("index", "<u4")])
_SEPARATORS = {"paragraph": re.compile(r"(\n[^\S\n]*(?:\n[^\S\n]*)+)"), "line": re.compile(r"(\n)")}
_SPACE = re.compile(r"\s+")


class ExactParagraphsSettings(Config):
    unit: Literal["paragraph", "line"] = "paragraph"
    """paragraph: what blank lines part. line: what line breaks part."""
    min_characters: int = Field(24, ge=1)
    """Shorter ones are never cut: a line of dialogue or a heading may well be there twice."""
    min_left: int = Field(1, ge=1)
    """A document of which fewer characters are left goes with its paragraphs."""
    memory_mb: float = Field(512, gt=0)
    """What merging may take, whatever the number of documents."""


class ExactParagraphs(Merging):
    """By 64 bits of XXH3 (as CCNet, section 3.1, by 64 bits of SHA-1), white space and case set aside. The first in
    order stays, also within a document."""

    kind: ClassVar[str] = "exact_paragraphs"
    Settings: ClassVar[type[Config]] = ExactParagraphsSettings
    settings: ExactParagraphsSettings

    def _pieces(self, text: str) -> list[str]:
        """Units at even places, what parts them at odd ones."""
        return _SEPARATORS[self.settings.unit].split(text)

    def sketch(self, documents: Sequence[Document]) -> bytes:
        records = [
            (xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass")), number, index)
            for document in documents
            for number in [id_hash(document)]
            for index, piece in enumerate(self._pieces(document.text)[::2])
            for plain in [_SPACE.sub(" ", piece).strip().lower()]
            if len(plain) >= self.settings.min_characters
        ]
        return np.array(records, dtype=_SKETCH).tobytes()

    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        paths = list(sketches)
        total, memory = sum(check_whole(path, _SKETCH) for path in paths), int(self.settings.memory_mb * 2**20)
        with Groups(verdicts / "scratch", _SKETCH, "content", total, memory) as groups:
            for records in read(paths, _SKETCH):
                groups.add(records)
            cut = Verdicts.write(verdicts, _VERDICT, map(_verdicts, groups.repeats()), total, memory)
        return {f"{self.settings.unit}s": total, "cut": cut}

    def judge(self, verdicts: Path) -> None:
        self._verdicts = Verdicts(verdicts, _VERDICT)

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        answers: list[Rejection | None] = []
        for document, rows in zip(documents, self._verdicts.of(documents)):
            answers.append(self._cut(document, set(rows["index"].tolist())) if len(rows) else None)
        return answers

    def _cut(self, document: Document, indices: set[int]) -> Rejection | None:
        pieces = self._pieces(document.text)
        kept = [
            piece + "".join(pieces[2 * index + 1 : 2 * index + 2])
            for index, piece in enumerate(pieces[::2])
            if index not in indices
        ]
        left = "".join(kept).strip("\n")
        if len(left.strip()) < self.settings.min_left:
            unit = self.settings.unit
            return Rejection(f"all {unit}s are in earlier documents", f"{len(indices)} of {len(pieces[::2])} {unit}s")
        document.text = left
        document.metadata[f"repeated_{self.settings.unit}s"] = len(indices)
        return None


def _verdicts(repeats: NDArray[Any]) -> NDArray[Any]:
    rows = np.empty(len(repeats), dtype=_VERDICT)
    rows["id"], rows["index"] = repeats["id"], repeats["index"]
    return rows
