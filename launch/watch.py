"""A live view of a run in the terminal."""

import shutil
import sys
import time
from pathlib import Path

from launch.status import describe, require_run
from megalm.metrics.events import read_events
from megalm.metrics.meters import format_count
from megalm.metrics.records import read_records

_BARS = "▁▂▃▄▅▆▇█"


def watch(run: Path, every: float = 2.0) -> int:
    """Redraw the run's state every few seconds until it is done or Ctrl-C; without a terminal, print it once."""
    require_run(run)
    while True:
        if not sys.stdout.isatty():
            print("\n".join(picture(run)))
            return 0
        columns = shutil.get_terminal_size().columns
        # Cut, since lines that wrap would push the top out of sight.
        lines = [line if len(line) <= columns else line[: columns - 1] + "…" for line in picture(run, columns - 60)]
        sys.stdout.write("\x1b[2J\x1b[H" + "\n".join(lines) + "\n")
        sys.stdout.flush()
        if any(event["event"] == "done" for event in read_events(run)[-3:]):
            return 0
        time.sleep(every)


def picture(run: Path, width: int = 60) -> list[str]:
    """The lines of the view."""
    path = run / "metrics.jsonl"
    records = list(read_records(path)) if path.exists() else []
    lines = [f"{run}  {time.strftime('%H:%M:%S')}", ""]
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens/s")):
        values = [value for record in records if isinstance(value := record.get(key), (int, float))]
        if values:
            course, low, high = sparkline(values, max(10, min(width, 120))), _short(min(values)), _short(max(values))
            lines.append(f"{name:14} {course}  {_short(values[-1])} (from {low} to {high})")
    return [*lines, "", *describe(run)]


def _short(value: float) -> str:
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"


def sparkline(values: list[float], width: int) -> str:
    """The course of `values` in one line of at most `width` characters, each the mean of a stretch."""
    width = min(width, len(values))
    bounds = [n * len(values) // width for n in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    low, high = min(means), max(means)
    return "".join(_BARS[int((mean - low) / ((high - low) or 1) * (len(_BARS) - 1))] for mean in means)
