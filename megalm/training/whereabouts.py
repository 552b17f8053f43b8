"""What this rank is doing, in a small file that the launcher's watchdog reads; and its Python stacks on SIGUSR2."""

import faulthandler
import json
import os
import signal
import time

FILE = "MEGALM_WHEREABOUTS"
"""Environment variable that names the file; launch/agent.py sets it."""
_WIDTH = 256


class Whereabouts:
    """Notes are overwritten in place, in one write, some microseconds each. Without a file they go nowhere."""

    def __init__(self, path: str | None = None):
        self._number = 0
        self._file: int | None = None
        self.step: int | None = None
        """Steps done, noted with the next note; None before the training loop."""
        if path:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            # Kept open: faulthandler writes to its number, whatever the interpreter is stuck in.
            self._stacks = open(path + ".stacks", "w")  # noqa: SIM115
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    @classmethod
    def of_environment(cls) -> "Whereabouts":
        return cls(os.environ.get(FILE))

    @property
    def are_watched(self) -> bool:
        """Whether someone looks, who ends ranks that get nowhere."""
        return self._file is not None

    def note(self, at: str) -> None:
        """Say where this rank is from now on."""
        if self._file is None:
            return
        self._number += 1
        note = {"n": self._number, "step": self.step, "since": round(time.time(), 3), "at": at[:120]}
        os.pwrite(self._file, json.dumps(note).encode().ljust(_WIDTH), 0)
