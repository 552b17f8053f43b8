"""The one exception a user can cause. Commands print it without a traceback and exit with 2."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class MegalmError(Exception):
    """One sentence: what is wrong, where (file, key, line), and what to do about it.

    echo: another rank says the same, so this one ends in silence.
    """

    def __init__(self, sentence: str, *, echo: bool = False):
        super().__init__(sentence)
        self.echo = echo


def reason(error: BaseException) -> str:
    """What a library's error says in its first line, or of what kind it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def writing(output: str | Path, way_out: str = "make room for it, or name another --output") -> Iterator[None]:
    """What the storage refuses while a command writes `output`, as a sentence."""
    try:
        yield
    except OSError as error:
        culprit = error.filename2 or error.filename
        where = "" if culprit is None or str(culprit) == str(output) else f": {culprit}"
        raise MegalmError(f"cannot write {output} ({error.strerror or error}{where}): {way_out}") from error


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main: a MegalmError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main() or 0)
    except MegalmError as error:
        if not error.echo:
            _say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


def _say(message: str) -> None:
    """Print to stderr, saying which of several ranks speaks."""
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
