"""Fine-tuning examples as rows: packed without contamination, or one in each row."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """What a model reads and what it should say there; n positions."""

    ids: np.ndarray
    """[n] ids the model reads."""
    labels: np.ndarray
    """[n] what each position should say: the next id for a language model (already shifted), a class for a head;
    [n, labels] of 0 and 1 where several classes may be true."""
    weights: np.ndarray
    """[n] 1 where a position is trained, else 0."""
