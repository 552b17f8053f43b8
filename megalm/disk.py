"""What is written is there after a power cut, too; and what cannot be written is known early."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_writing(path: Path) -> None:
    """Learn before long work whether its file can be written: what is there stays as it is, what is not stays away.
    Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not os.path.lexists(path)
    path.open("ab").close()
    if is_new:
        path.unlink()
