"""Batches for training and for the held-out loss.

The samples of a run are numbered from 0 in one order that no layout changes (megalm/data/mixture.py). A step takes
the next global_batch_size of them; data-parallel rank r of R takes every R-th from the r-th on. What a run must
remember is therefore one number.
"""

import json
import queue
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from megalm.data.batch import Batch
from megalm.data.samples import Order, Samples
from megalm.errors import MegalmError

Step = tuple[list[Batch], dict[str, Any]]
"""The micro-batches of one step on one rank, and the state of the loader after it."""
ORDERED_AHEAD = 512
"""Samples whose place is computed at a time, since numpy's cost per call is far above its cost per number."""

_TOLD = {
    "seed": ("run.seed", "run.seed"),
    "sequence_length": ("train.sequence_length", "train.sequence_length"),
    "shuffle": ("data.shuffle", "data.shuffle"),
    "tokenizer": ("data.tokenizer", "data.tokenizer"),
    "template": ("the chat template", "task.template"),
    "sorted_by": ("train.global_batch_size, by which the rows are sorted,", "train.global_batch_size"),
    "corpora": ("the content of data.sources", "data.sources"),
    "weights": ("the weights of data.sources", "data.sources"),
}
"""What a blend's fields are to a user, and the config's key of each."""
_FIXED = ("data.tokenizer", "task.template")
"""Those that no run may change."""


class Loader:
    """Endless iterator over steps: (micro-batches of this rank, state after the step).

    The state is a small record of plain values, the same on every rank and valid for any number of ranks and any
    batch size: `samples` consumed, and the `blend` they were drawn from.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        rank: int,
        size: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool = True,
        prefetch: int = 2,
        state: Mapping[str, Any] | None = None,
        start: int = 0,
        allowed: Collection[str] = (),
    ) -> None:
        """Start reading ahead.

        Args:
            rank, size: data-parallel coordinates.
            global_batch_size: sequences per step over all ranks.
            micro_batch_size: rows of each batch.
            seed, shuffle: of the order (data.mixture.Mixture).
            prefetch: steps prepared ahead by a thread.
            state: continue behind this record of an earlier loader.
            start: without a state, the first sample.
            allowed: keys of the config (as _TOLD names them) that may differ from the state's; the samples then start
                anew, and `restarted` names them.

        Raises:
            MegalmError: batch sizes that do not divide; a state that was taken from another blend.
        """
        assert 0 <= rank < size
        if global_batch_size % (micro_batch_size * size):
            step = micro_batch_size * size
            nearest = max(step, round(global_batch_size / step) * step)
            raise MegalmError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"{size} data-parallel ranks: the nearest that is, is {nearest}"
            )
        self.blend: dict[str, Any] = {
            "seed": seed,
            "shuffle": shuffle,
            **samples.facts,
            "corpora": [corpus.fingerprint for corpus in samples.corpora],
            "weights": [corpus.weight for corpus in samples.corpora],
        }
        """What fixes the order of samples."""
        self.epoch = sum(corpus.samples for corpus in samples.corpora)
        """Samples of all corpora: a pass over the data, whatever the weights."""
        self.restarted = ""
        if state is not None:
            self.restarted = ", ".join(self._differences(state, allowed))
            start = 0 if self.restarted else int(state["samples"])
        self._steps: Iterator[Step] = _steps(
            samples,
            samples.order(seed, shuffle),
            self.blend,
            start,
            rank,
            size,
            global_batch_size,
            micro_batch_size,
        )
        if prefetch:
            self._steps = _Prefetched(self._steps, prefetch)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Stop reading ahead. The loader yields nothing more."""
        if isinstance(self._steps, _Prefetched):
            self._steps.close()
        self._steps = iter(())

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _differences(self, state: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
        """Allowed keys in which the state's blend is another. Raises MegalmError for others, and for other classes."""
        labels = state["blend"].get("labels")
        if labels and labels != self.blend.get("labels"):
            raise MegalmError(
                f"cannot continue at sample {state['samples']:,}: the classes are no longer those that the head was "
                f"trained on (now {json.dumps(self.blend.get('labels'), ensure_ascii=False)}); name them in "
                f"task.labels in the old order, {json.dumps(labels, ensure_ascii=False)}, or start a new run"
            )
        found = []
        for key, (what, name) in _TOLD.items():
            then, now = state["blend"].get(key), self.blend.get(key)
            if then == now:
                continue
            if name not in allowed:
                way = f", or allow it with checkpoint.allow_changes=[{name}]" if name not in _FIXED else ""
                raise MegalmError(
                    f"cannot continue at sample {state['samples']:,}: {what} is no longer what the run was started "
                    f"with ({then}, now {now}), so the samples would be others; restore it, start a new run{way}"
                )
            found.append(what)
        return found


def _steps(
    source: Samples,
    order: Order,
    blend: dict[str, Any],
    samples: int,
    rank: int,
    size: int,
    global_batch_size: int,
    micro: int,
) -> Iterator[Step]:
    """Steps from a sample on. A function of its own, since the thread that runs it must not keep the loader alive."""
    rows = global_batch_size // size
    steps = -(-ORDERED_AHEAD // rows)
    offsets = np.arange(steps)[:, None] * global_batch_size + size * np.arange(rows) + rank  # [steps, rows]
    while True:
        numbers = samples + offsets
        corpora, windows = (values.reshape(offsets.shape).tolist() for values in order(numbers.ravel()))
        for step in range(steps):
            chosen = list(zip(corpora[step], windows[step], strict=True))
            batches = [
                source.batch(chosen[row : row + micro], numbers[step, row : row + micro])
                for row in range(0, rows, micro)
            ]
            samples += global_batch_size
            yield batches, {"samples": samples, "blend": blend}


class _Prefetched:
    """An iterator whose items a background thread prepares, at most `depth` ahead.

    An exception of the iterator is raised in the consumer, at the item where it arose. The thread holds no reference
    to this object, so it ends when this is closed, is no longer referenced, or the program ends.
    """

    def __init__(self, iterator: Iterator[Step], depth: int) -> None:
        self._items: queue.Queue[Step | BaseException] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=_fill, args=(iterator, self._items, self._stopping), name="megalm-loader", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._stopping, self._items, self._thread)
        self._thread.start()

    def __iter__(self) -> "_Prefetched":
        return self

    def __next__(self) -> Step:
        if self._failure is None:
            item = self._items.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        self._finalizer()


def _fill(iterator: Iterator[Step], items: "queue.Queue[Step | BaseException]", stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            item: Step | BaseException = next(iterator)
        except BaseException as error:  # handed to the consumer, which raises it
            item = error
        while not stopping.is_set():
            try:
                items.put(item, timeout=0.2)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _stop(stopping: threading.Event, items: "queue.Queue[Step | BaseException]", thread: threading.Thread) -> None:
    stopping.set()
    while not items.empty():
        items.get_nowait()
    thread.join(timeout=10)


def held_out_samples(samples: Samples, sequences: int) -> np.ndarray:
    """Numbers in their corpus of the samples that held_out_batches() takes: [sequences], or fewer."""
    [corpus] = samples.corpora
    count = min(sequences, corpus.samples)
    return np.arange(count) * corpus.samples // count


def held_out_batches(
    samples: Samples,
    *,
    rank: int,
    size: int,
    micro_batch_size: int,
    sequences: int,
) -> Iterator[Batch]:
    """Micro-batches of `sequences` samples of one held-out corpus (all of them if it has fewer), always the same.

    The samples are evenly spaced over the corpus, so that a few of them stand for all of it, and taken in order. Over
    all ranks each appears exactly once. Every rank gets the same number of micro-batches: rows beyond the last sample
    are padding with loss_mask 0 and sample id -1. Other sample ids are places in held_out_samples().
    """
    chosen = held_out_samples(samples, sequences)
    count = len(chosen)
    per_rank = -(-count // (size * micro_batch_size)) * micro_batch_size
    numbers = rank + size * np.arange(per_rank)

    def micro_batch(start: int) -> Batch:
        here = numbers[start : start + micro_batch_size]
        rows = [(0, int(chosen[n])) if n < count else None for n in here]
        return samples.batch(rows, np.where(here < count, here, -1))

    return map(micro_batch, range(0, per_rank, micro_batch_size))
