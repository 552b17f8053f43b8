"""Of documents with the same text, the first is kept."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Merging
from megalm.curate.steps.records import Groups, Verdicts, check_whole, id_hash, read, runs

_SKETCH = np.dtype([("high", "<u8"), ("low", "<u8"), ("id", "<u8")])
_VERDICT = np.dtype([("id", "<u8"), ("copies", "<u4"), ("kept", "u1")])


class ExactDocumentsSettings(Config):
    ignore_space_and_case: bool = False
    """Whether texts count as the same that differ in white space and case only."""
    memory_mb: float = Field(512, gt=0)
    """What merging may take, whatever the number of documents."""


class ExactDocuments(Merging):
    """By 128 bits of XXH3: among 10^10 documents the chance of one wrong match is 10^-19.

    A document that is kept learns how many there are of it: metadata `copies`."""

    kind: ClassVar[str] = "exact_documents"
    Settings: ClassVar[type[Config]] = ExactDocumentsSettings
    settings: ExactDocumentsSettings

    def sketch(self, documents: Sequence[Document]) -> bytes:
        records = np.empty(len(documents), dtype=_SKETCH)
        for record, document in zip(records, documents):
            text = document.text
            if self.settings.ignore_space_and_case:
                text = re.sub(r"\s+", " ", text.strip()).lower()
            digest = xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass"))
            record["high"], record["low"], record["id"] = digest >> 64, digest & (2**64 - 1), id_hash(document)
        return records.tobytes()

    def merge(self, sketches: Iterable[Path], verdicts: Path) -> dict[str, Any]:
        paths = list(sketches)
        total, memory = sum(check_whole(path, _SKETCH) for path in paths), int(self.settings.memory_mb * 2**20)
        told = {"documents": total, "texts with copies": 0, "removed": 0, "most copies of a text": 1 if total else 0}
        with Groups(verdicts / "scratch", _SKETCH, "high", total, memory) as groups:
            for records in read(paths, _SKETCH):
                groups.add(records)
            rows = (_verdicts(part, told) for part in groups.parts())
            Verdicts.write(verdicts, _VERDICT, rows, total, memory)
        return told

    def judge(self, verdicts: Path) -> None:
        self._verdicts = Verdicts(verdicts, _VERDICT)

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        answers: list[Rejection | None] = []
        for document, rows in zip(documents, self._verdicts.of(documents)):
            copies = int(rows["copies"][0]) if len(rows) else 1
            if copies > 1 and rows["kept"][0]:
                document.metadata["copies"] = copies
            rejected = copies > 1 and not rows["kept"][0]
            answers.append(Rejection("same text as an earlier document", f"one of {copies}") if rejected else None)
        return answers


def _verdicts(part: NDArray[Any], told: dict[str, Any]) -> NDArray[Any]:
    """Of texts that are there more than once. `part` is sorted by `high`, equal ones in order."""
    part = part[np.lexsort((part["low"], part["high"]))]  # stable: the first in order comes first
    begins = runs(part["high"], part["low"])
    sizes = np.diff(np.append(np.flatnonzero(begins), len(part)))
    of = np.repeat(sizes, sizes)
    rows = np.empty(int((of > 1).sum()), dtype=_VERDICT)
    rows["id"], rows["copies"], rows["kept"] = part["id"][of > 1], of[of > 1], begins[of > 1]
    told["texts with copies"] += int((sizes > 1).sum())
    told["removed"] += int((sizes - 1).sum())
    told["most copies of a text"] = max(told["most copies of a text"], int(sizes.max(initial=0)))
    return rows
