"""Cut the token stream of a corpus into samples.

Window k of a corpus is the tokens k*S .. k*S + S of its stream: S inputs and, one further, S labels. Every token but
the first is the label of exactly one window. The last window may be short: it is padded, and its padding masked.

Documents follow one another inside a window. `attend_across_documents` says what that means:

- True: one causal sequence. Segment ids are all 0, positions run from 0 to S - 1, and every token is trained, the
  first token of a document too (predicted from the end of the one before).
- False: each document is its own segment with positions from 0. The label after a document's end belongs to another
  document that attention cannot see, so that position is masked out; the end itself is trained. The remainder of a
  document that began in an earlier window starts at position 0. Padding is a segment of its own.
"""

from collections.abc import Sequence

import numpy as np


from megalm.data.batch import Batch
from megalm.data.index import ShardReader


def window_count(tokens: int, sequence_length: int) -> int:
    """Windows of a stream: enough that each token but the first is a label."""
    return -(-(tokens - 1) // sequence_length)


class Packer:
    """Builds batches of windows."""

    def __init__(self, sequence_length: int, pad_id: int, attend_across_documents: bool) -> None:
        self._length = sequence_length
        self._pad_id = pad_id
        self._attend_across_documents = attend_across_documents
        self._ramp = np.arange(sequence_length, dtype=np.int64)

    def batch(self, rows: Sequence[tuple[ShardReader, int] | None], sample_ids: np.ndarray) -> Batch:
        """A batch of one window (corpus, number) per row; None is a row of padding, masked throughout."""
        length = self._length
        ids = np.empty((len(rows), length + 1), np.int64)
        starts = None if self._attend_across_documents else np.zeros((len(rows), length + 1), bool)
        loss_mask = np.ones((len(rows), length), np.float32)
        for row, window in enumerate(rows):
            present = 0
            if window is not None:
                reader, number = window
                begin = number * length
                present = min(length + 1, reader.tokens_total - begin)
                reader.read_into(ids[row, :present], begin)
                if starts is not None:
                    starts[row, reader.document_starts(begin, begin + present) - begin] = True
            if present <= length:
                ids[row, present:] = self._pad_id
                loss_mask[row, max(present - 1, 0) :] = 0.0
                if starts is not None:
                    starts[row, present] = True
        if starts is None:
            segment_ids = np.zeros((len(rows), length), np.int64)
            positions = np.tile(self._ramp, (len(rows), 1))
        else:
            starts[:, 0] = False
            segment_ids = np.cumsum(starts[:, :-1], axis=1, dtype=np.int64)
            positions = self._ramp - np.maximum.accumulate(np.where(starts[:, :-1], self._ramp, 0), axis=1)
            loss_mask[starts[:, 1:]] = 0.0
        return Batch(ids[:, :-1], ids[:, 1:], loss_mask, segment_ids, positions, np.asarray(sample_ids, np.int64))
