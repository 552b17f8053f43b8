"""The one exception a user can cause. Commands print it without a traceback and exit with 2."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class MegalmError(Exception):
    """One sentence: what is wrong, where (file, key, line), and what to do about it."""


def main_guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main: a MegalmError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main() or 0)
    except MegalmError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


def _say(message: str) -> None:
    """Print to stderr, once per machine: the ranks of a run make the same mistake together."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
