"""The one exception a user can cause. Commands print it without a traceback and exit with 2."""

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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
