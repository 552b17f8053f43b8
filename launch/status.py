"""Runs and their jobs: how far they are, what they said, and how to end or move them."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from launch import slurm
from launch.target import newest_step
from megalm.config import load
from megalm.errors import MegalmError
from megalm.metrics.events import read_events
from megalm.metrics.meters import format_count, format_duration
from megalm.training.config import RunConfig

_UNITS = dict.fromkeys(("blocked", "others"), " s")
"""Of facts of events."""


def require_run(run: Path) -> None:
    """Raises MegalmError if `run` is no run's folder."""
    if not run.exists():
        raise MegalmError(f"{run} does not exist: name the folder of a run, what run.directory says in its config")
    if not any((run / name).exists() for name in ("launch", "metrics.jsonl", "config.yaml")):
        raise MegalmError(f"{run} is not the folder of a run: name what run.directory says in its config")


def jobs_of(run: Path) -> list[str]:
    """Numbers of the run's jobs of Slurm, oldest first; empty if it was started otherwise."""
    require_run(run)
    numbers = [event["job"] for event in read_events(run) if event["event"] in ("submitted", "job") and event["job"]]
    return list(dict.fromkeys(numbers))


def waiting_or_running(run: Path) -> list[str]:
    """The run's jobs that Slurm has not ended. Raises MegalmError if there is none."""
    alive = [
        number for number in jobs_of(run) if slurm.job(number).get("JobState") in ("PENDING", "RUNNING", "SUSPENDED")
    ]
    if not alive:
        raise MegalmError(f"{run} has no job that waits or runs: submit it (launch submit)")
    return alive


def last_record(run: Path) -> dict[str, Any] | None:
    """The newest record of metrics.jsonl, read from its end."""
    import json

    path = run / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None


def steps_of(run: Path) -> int | None:
    """Steps that a run is to take, by its config; None without one."""
    config = run / "config.yaml"
    return load(str(config), RunConfig).train.steps if config.exists() else None


def describe(run: Path) -> list[str]:
    """A run's state in a few lines."""
    require_run(run)
    lines = []
    record = last_record(run)
    if record:
        rate = record.get("tokens_per_second")
        speed = f", {format_count(rate)} tokens/s" if rate else ""
        ago = f", {format_duration(time.time() - record['time'])} ago" if "time" in record else ""
        of, loss = steps_of(run) or "?", record.get("loss")
        lines.append(f"step {record['step']} of {of}{ago}, loss {'nan' if loss is None else f'{loss:.4f}'}{speed}")
    else:
        lines.append("no step yet")
    saved = newest_step(run)
    lines.append(f"newest checkpoint: {f'step {saved}' if saved else 'none yet'}")
    for number in jobs_of(run):
        try:
            record_of_job = slurm.job(number)
        except MegalmError as error:
            lines.append(f"job {number}: unknown, since {error}")
            break
        state = record_of_job.get("JobState", "no longer known to Slurm")
        nodes = record_of_job.get("NodeList", "(null)")
        lines.append(f"job {number}: {state}" + (f" on {nodes}" if nodes != "(null)" else ""))
    events = read_events(run)
    if events:
        lines.append("events: " + ", ".join(f"{kind} {count}" for kind, count in _counts(events).items()))
        lines.extend(event_line(event) for event in [event for event in events if event["event"] != "ranks"][-5:])
    return lines


def _counts(events: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in events:
        counts[event["event"]] = counts.get(event["event"], 0) + 1
    return counts


def event_line(event: dict[str, Any]) -> str:
    """An event in one line."""
    when, kind, facts = event_words(event)
    return f"{when}  {kind:10} {facts}".rstrip()


def event_words(event: dict[str, Any]) -> tuple[str, str, str]:
    """When it happened, what, and what is known of it."""
    facts = {
        key: value
        for key, value in event.items()
        if key not in ("time", "event", "command") and value not in ("", [], None)
    }
    words = ", ".join(f"{key.replace('_', ' ')} {_short(value)}{_UNITS.get(key, '')}" for key, value in facts.items())
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])), event["event"], words


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        words = [str(each) if isinstance(each, str) else _short(each) for each in value]
        value = " ".join(words if len(words) <= 8 else [*words[:2], "...", words[-1], f"({len(words)})"])
    text = str(value)
    return text if len(text) < 100 else text[:97] + "..."


def log_of(run: Path) -> Path:
    """The newest log of a run's jobs. Raises MegalmError if there is none."""
    require_run(run)
    logs = [Path(event["log"]) for event in read_events(run) if event["event"] == "job" and event.get("log")]
    logs += [run / "logs" / f"slurm-{number}.log" for number in jobs_of(run)]
    there = [log for log in logs if log.is_file()]
    if not there:
        raise MegalmError(f"{run} has no log: its jobs have not started yet, or it ran in a terminal (launch local)")
    return max(there, key=lambda log: log.stat().st_mtime)


def show_log(run: Path, *, follow: bool, lines: int) -> int:
    """Print the end of the newest log, and what comes if `follow`."""
    log = log_of(run)
    command = ["tail", "-n", str(lines), *(["-F"] if follow else []), str(log)]
    print(f"==> {log} <==", flush=True)
    if follow:
        os.execvp(command[0], command)
    return subprocess.run(command).returncode
