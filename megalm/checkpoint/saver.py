"""Checkpoints written by a thread while training goes on."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from megalm.checkpoint.folder import NotWritten
from megalm.checkpoint.tensors import Snapshot, Stretch


class Saver:
    """Writes one checkpoint at a time from a copy of the training state. Every rank has one and calls the same."""

    def __init__(self, numbers: int, *, pinned: bool, asynchronous: bool):
        """numbers: of fp32 that this rank saves. pinned: the state is on a GPU. asynchronous: see CheckpointConfig."""
        self._numbers, self._pinned, self._asynchronous = numbers, pinned, asynchronous
        self._snapshot = Snapshot(numbers, pinned=pinned) if asynchronous else None
        # The memory is handed out while the first batches are read.
        self._thread = self._start(self._snapshot.touch) if self._snapshot else None
        self._outcome: Path | NotWritten | BaseException | None = None

    def save(
        self,
        stretches: Iterable[Stretch],
        rank: int,
        dtype: str,
        write: Callable[[Snapshot], Path],
    ) -> None:
        """Copy `stretches`, which then may change, and let `write` make a checkpoint of the copy.

        The outcome of the save before must have been taken (`outcome(wait=True)`).
        """
        assert self._outcome is None
        self._join()
        snapshot = self._snapshot or Snapshot(self._numbers, pinned=self._pinned)
        snapshot.take(stretches, rank, dtype)

        def work() -> None:
            try:
                self._outcome = write(snapshot)
            except BaseException as error:  # raised again where the outcome is taken
                self._outcome = error

        if self._asynchronous:
            self._thread = self._start(work)
        else:
            work()

    def outcome(self, *, wait: bool) -> Path | NotWritten | None:
        """The checkpoint that was written, or why it was not: once for each save, None if there is nothing to tell.

        Raises whatever else went wrong in the thread.
        """
        if wait:
            self._join()
        if self._thread is not None and self._thread.is_alive():
            return None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException) and not isinstance(outcome, NotWritten):
            raise outcome
        return outcome

    @staticmethod
    def _start(work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name="megalm-saver", daemon=True)
        thread.start()
        return thread

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
