"""Loops over arrays, compiled by numba when they are first called and kept on the disk for the next process."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(loop: Loop) -> Loop:
    """Kept beside the module, or in the user's cache where that folder is read-only; where neither can be written, each
    process compiles for itself."""
    made: Any
    try:
        made = numba.njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # no place for it
        made = numba.njit(nogil=True)(loop)
    return made
