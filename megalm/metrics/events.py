"""What happened to a run beside its steps: one JSON object per line, appended and never rewritten.

RUN/events.jsonl is the trainer's (saved, skipped, rolled back, stopping), RUN/launch/events.jsonl the launcher's
(started, failed, restarted, hung, requeued, done): a file has one writer at a time, so that lines stay whole on file
systems without atomic appends. Every event has `time` (seconds since 1970) and `event`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]

TRAINER, LAUNCHER = "events.jsonl", "launch/events.jsonl"


def write_event(path: Path, event: str, **facts: Any) -> None:
    """Append one event to a file, which is made with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), "event": event} | facts, ensure_ascii=False).encode() + b"\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a line cut short, which would take this one with it
                line = b"\n" + line
        file.write(line)


def read_events(run: Path) -> list[Event]:
    """All events of a run folder, trainer's and launcher's, in order of time. Lines cut short are left out."""
    events = []
    for name in (TRAINER, LAUNCHER):
        if (run / name).exists():
            # Not splitlines(), which also ends lines at characters that JSON leaves in texts, such as U+2028.
            for line in (run / name).read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(event, dict) and "time" in event and "event" in event:
                    events.append(event)
    return sorted(events, key=lambda event: event["time"])
