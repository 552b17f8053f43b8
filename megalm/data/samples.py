"""What a loader takes its rows from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megalm.data.batch import Batch
from megalm.data.mixture import Blended

Order = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Global sample numbers [n] -> corpus [n] and number of the sample there [n]; no rank or layout changes it."""


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

    def order(self, seed: int, shuffle: bool) -> Order:
        """Which sample comes n-th."""
        ...

    def batch(self, rows: Sequence[tuple[int, int] | None], sample_ids: np.ndarray) -> Batch:
        """A batch of one sample (corpus, number) per row; None is a row of padding, masked throughout."""
        ...
