"""A share of the documents, the same ones in every run."""

from collections.abc import Sequence
from typing import ClassVar

import xxhash
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Step


class SampleSettings(Config):
    share: float = Field(gt=0, le=1)
    """Of the documents, how many to keep. A larger share keeps all that a smaller one keeps."""
    seed: int = 0
    """Another seed draws another sample."""


class Sample(Step):
    """Keep a document if the hash of its id is small enough: it needs no state, and one document more or less changes
    nothing for the others."""

    kind: ClassVar[str] = "sample"
    Settings: ClassVar[type[Config]] = SampleSettings
    settings: SampleSettings

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        limit = self.settings.share * 2**64
        key = f"{self.settings.seed}\n"
        drawn = (
            xxhash.xxh3_64_intdigest((key + document.id).encode("utf-8", "surrogatepass")) for document in documents
        )
        return [None if number < limit else Rejection("not in the sample") for number in drawn]
