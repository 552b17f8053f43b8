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
from megalm.data.config import SourceConfig
from megalm.data.index import OpenShards, ShardReader
from megalm.data.mixture import Blended, Mixture
from megalm.data.samples import Order
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer


def window_count(tokens: int, sequence_length: int) -> int:
    """Windows of a stream: enough that each token but the first is a label."""
    return -(-(tokens - 1) // sequence_length)


class Windows:
    """The samples of shard folders (data.samples.Samples): windows of their token streams."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        attend_across_documents: bool = True,
        verify_checksums: bool = False,
    ) -> None:
        """sequence_length: S; batches are [rows, S].

        Raises MegalmError for shards that are missing, damaged, empty or of another tokenizer.
        """
        if not sources:
            raise MegalmError("data.sources is empty: name at least one shard folder")
        opened = OpenShards()
        self._readers = [ShardReader(source.path, tokenizer, verify_checksums, opened) for source in sources]
        self._packer = Packer(sequence_length, tokenizer.pad_id, attend_across_documents)
        self.corpora = [
            Blended(reader.fingerprint, window_count(reader.tokens_total, sequence_length), source.weight)
            for reader, source in zip(self._readers, sources, strict=True)
        ]
        self.facts = {"sequence_length": sequence_length, "tokenizer": tokenizer.fingerprint}

    def order(self, seed: int, shuffle: bool) -> Order:
        return Mixture(self.corpora, seed, shuffle)

    def batch(self, rows: Sequence[tuple[int, int] | None], sample_ids: np.ndarray) -> Batch:
        """A batch of one window (corpus, number) per row; None is a row of padding, masked throughout."""
        return self._packer.batch([row and (self._readers[row[0]], row[1]) for row in rows], sample_ids)


class Packer:
    """Builds batches of windows."""

    def __init__(self, sequence_length: int, pad_id: int, attend_across_documents: bool) -> None:
        self._length = sequence_length
        self._pad_id = pad_id
        self._attend_across_documents = attend_across_documents
        self._constants: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def batch(self, rows: Sequence[tuple[ShardReader, int] | None], sample_ids: np.ndarray) -> Batch:
        """A batch of one window (corpus, number) per row; None is a row of padding, masked throughout.

        Arrays that are the same for many batches are shared between them, and therefore read-only.
        """
        length = self._length
        ids = np.empty((len(rows), length + 1), np.int64)
        present = []
        begins: list[list[int]] = []
        for row, window in enumerate(rows):
            if window is None:
                present.append(0)
                begins.append([])
            else:
                reader, number = window
                start = number * length
                present.append(min(length + 1, reader.tokens_total - start))
                begins.append(reader.read_into(ids[row, : present[row]], start))
        loss_mask, segment_ids, positions = self._constant(len(rows))
        if min(present) <= length:
            loss_mask = loss_mask.copy()
            for row, tokens in enumerate(present):
                ids[row, tokens:] = self._pad_id
                loss_mask[row, max(tokens - 1, 0) :] = 0.0
        if not self._attend_across_documents:
            loss_mask, segment_ids, positions = self._isolate(loss_mask, begins, present)
        return Batch(ids[:, :-1], ids[:, 1:], loss_mask, segment_ids, positions, np.asarray(sample_ids, np.int64))

    def _constant(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask, segment ids and positions of whole windows whose documents see each other."""
        if rows not in self._constants:
            shape = rows, self._length
            arrays = (
                np.ones(shape, np.float32),
                np.zeros(shape, np.int64),
                np.tile(np.arange(self._length, dtype=np.int64), (rows, 1)),
            )
            for array in arrays:
                array.flags.writeable = False
            self._constants[rows] = arrays
        return self._constants[rows]

    def _isolate(
        self, loss_mask: np.ndarray, begins: list[list[int]], present: list[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask, segment ids and positions when each document is its own segment.

        Args:
            loss_mask: [rows, S], 0 on padding.
            begins: of each row, the places at which documents begin, in 0..S.
            present: of each row, its tokens that are not padding, in 0..S+1.
        """
        length = self._length
        mask = loss_mask.copy()
        starts: list[int] = []  # of segments, in the flattened batch
        numbers: list[int] = []  # of segments, within their row
        for row, (places, tokens) in enumerate(zip(begins, present, strict=True)):
            inner = [place for place in [*places, tokens] if 0 < place <= length]
            mask[row, [place - 1 for place in inner]] = 0.0
            segments = [0, *(place for place in inner if place < length)]
            starts += [row * length + place for place in segments]
            numbers += range(len(segments))
        lengths = np.diff([*starts, mask.size])
        segment_ids = np.repeat(numbers, lengths).reshape(mask.shape)
        positions = (np.arange(mask.size) - np.repeat(starts, lengths)).reshape(mask.shape)
        return mask, segment_ids, positions
