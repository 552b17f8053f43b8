"""Numbers on a command line: types for argparse, which says which option is wrong."""

import argparse
from functools import partial


def at_least(least: int, text: str) -> int:
    """A whole number from `least` on."""
    if not text.removeprefix("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
    return int(text)


count = partial(at_least, 1)
count_or_zero = partial(at_least, 0)
