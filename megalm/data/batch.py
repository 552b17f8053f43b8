"""What a loader yields."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a forward pass. Arrays are [batch, seq] unless said otherwise."""

    tokens: np.ndarray
    """Input ids, int64."""
    labels: np.ndarray
    """The id each position predicts, already shifted, int64."""
    loss_mask: np.ndarray
    """1.0 where the position is trained, else 0.0, float32."""
    segment_ids: np.ndarray
    """Number of the document a position belongs to within its row, from 0, int64."""
    positions: np.ndarray
    """Position within the document (or the row), from 0, int64."""
    sample_ids: np.ndarray
    """[batch] Global number of each row in the order of training, int64."""

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows start..stop as a batch."""
        return Batch(*(getattr(self, field)[start:stop] for field in self.__dataclass_fields__))
