"""What a loader takes its rows from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megalm.data.batch import Batch
from megalm.data.mixture import Blended


class Samples(Protocol):
    """Corpora whose samples can be reached by number: windows of shards (packing.Windows), or fine-tuning examples
    (examples.Rows)."""

    @property
    def corpora(self) -> Sequence[Blended]:
        """How many samples each corpus has, and its share."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What, beside the corpora, fixes what a number stands for; plain values, kept in checkpoints."""
        ...

    def batch(self, rows: Sequence[tuple[int, int] | None], sample_ids: np.ndarray) -> Batch:
        """A batch of one sample (corpus, number) per row; None is a row of padding, masked throughout."""
        ...
