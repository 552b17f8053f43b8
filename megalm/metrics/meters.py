"""Small measuring instruments of a running training, and how their readings are spelled."""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable


class Rate:
    """Things per second over the last `window` reports. Time spent elsewhere (saving, evaluating) counts."""

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._done = 0.0
        self._reports: deque[tuple[float, float]] = deque([(clock(), 0.0)], maxlen=window + 1)

    def add(self, amount: float) -> None:
        """Report that `amount` more things are done."""
        self._done += amount
        self._reports.append((self._clock(), self._done))

    def per_second(self) -> float:
        """NaN before the first report."""
        (start, before), (end, after) = self._reports[0], self._reports[-1]
        return (after - before) / (end - start) if end > start else math.nan


def resident_memory() -> int:
    """The most bytes of RAM that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def format_duration(seconds: float) -> str:
    """Two leading units: 45s, 3m 20s, 2h 05m, 4d 03h. A dash when unknown."""
    if not math.isfinite(seconds):
        return "-"
    seconds = round(max(seconds, 0))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m {seconds % 60:02d}s"
    return f"{seconds}s"


def format_count(value: float) -> str:
    """At least three digits and a unit of thousands: 950, 1.23K, 45.6M, 789B, 15.1T. A dash when unknown."""
    if not math.isfinite(value):
        return "-"
    for unit in ("", "K", "M", "B", "T"):
        if abs(value) < 999.5 or unit == "T":
            break
        value /= 1000
    if abs(value) >= 99.95 or value == int(value):
        return f"{value:.0f}{unit}"
    return f"{value:.1f}{unit}" if abs(value) >= 9.995 else f"{value:.2f}{unit}"


def format_bytes(value: float) -> str:
    """Binary units: 512 MiB, 1.3 GiB."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
