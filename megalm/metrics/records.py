"""RUN/metrics.jsonl: one JSON object per logged step.

Keys that readers know: step (optimizer steps done), loss (nats per token), lr, grad_norm, tokens (trained so far),
tokens_per_second, memory (bytes), held_out ({corpus: nats per token}), bits_per_byte ({corpus: bits per byte of
held-out text}), scores ({corpus: {metric: value}}), selection ({value, best, best_step, since}: what evaluate.metric
was, and is at its best). Others pass through. A number that is not finite is written as null, since JSON has no name
for it.
"""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

logger = logging.getLogger(__name__)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a metrics.jsonl, one at a time. A line cut short by a crash is left out, and the log says so."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
            else:
                logger.warning("%s line %d is not a record (cut short?) and is left out", path, number)


def evaluated(record: Record) -> dict[str, dict[str, float]]:
    """What an evaluation said, as {metric: {corpus: value}}; empty for the record of a step without one."""
    found: dict[str, dict[str, float]] = {
        "loss": dict(record.get("held_out") or {}),
        "bits_per_byte": dict(record.get("bits_per_byte") or {}),
    }
    for corpus, scores in (record.get("scores") or {}).items():
        for metric, value in scores.items():
            found.setdefault(metric, {})[corpus] = value
    return {metric: values for metric, values in found.items() if values}


def write_record(record: Record) -> str:
    """One line of JSON, without its end."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
