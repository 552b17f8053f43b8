"""One run at a time in a folder."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from megalm.errors import MegalmError


class Lock:
    """RUN/.lock: one run at a time writes a folder. Held until the process ends, however it ends."""

    def __init__(self, directory: Path):
        self._path = directory / ".lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises MegalmError if another process holds it, or if the folder cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+")
        except OSError as error:
            raise MegalmError(
                f"{self._path} cannot be written ({error.strerror}): mend its permissions, or choose another "
                "run.directory"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise MegalmError(
                f"{self._path.parent} is being written by another run ({self._file.read().strip()}): wait for it, stop "
                "it, or choose another run.directory"
            ) from None
        except OSError:
            return  # a file system without locks
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
