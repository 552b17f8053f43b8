"""Several runs, or checkpoints of them, side by side: what they reached, and their scores with standard errors.

Scores are RUN/evaluation/step-N.json, which tools/evaluate_model.py writes.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.errors import MegalmError
from megalm.metrics.meters import format_count
from megalm.metrics.records import read_records

MAIN = ("acc_norm", "exact_match", "acc", "bits_per_byte")
"""Of the metrics that a task has, the first of these is drawn."""


@dataclass(frozen=True)
class Score:
    """error: standard error, NaN where there is none."""

    value: float
    error: float


@dataclass(frozen=True)
class Evaluated:
    """One results file. scores: by task, then metric. hashes: of the questions, by task."""

    step: int
    tokens: int
    scores: dict[str, dict[str, Score]]
    hashes: dict[str, str]


@dataclass(frozen=True)
class Course:
    """A run up to a step. run: its folder. held_out, bits_per_byte: by corpus, the last ones. evaluated: by step."""

    run: Path
    step: int
    tokens: int | None
    loss: float
    held_out: dict[str, float]
    bits_per_byte: dict[str, float]
    evaluated: list[Evaluated] = field(default_factory=list)


def read_course(path: Path) -> Course:
    """Of a run folder, or up to the step of RUN/checkpoints/step-N, or of `best` beside it, which names one.

    loss: of the last record, in nats per token. Raises MegalmError for what is neither, or has no records yet.
    """
    named = path.resolve()
    if named.parent.name == "checkpoints" and named.is_file():  # best, or latest
        named = named.with_name(named.read_text(errors="replace").strip())
    checkpoint = named.parent.name == "checkpoints" and named.name.startswith("step-")
    run, last = (named.parent.parent, int(named.name.removeprefix("step-"))) if checkpoint else (named, math.inf)
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise MegalmError(f"{path} has no metrics.jsonl: name the folder of a run, or RUN/checkpoints/step-N")
    record: dict[str, Any] = {}
    held_out: dict[str, float] = {}
    bits: dict[str, float] = {}
    for each in read_records(metrics):
        if each["step"] > last:
            continue
        record = each
        held_out, bits = each.get("held_out") or held_out, each.get("bits_per_byte") or bits
    if not record:
        raise MegalmError(f"{metrics} holds no records up to the step of {path}: name a later one")
    files = sorted((run / "evaluation").glob("step-*.json"))
    evaluated = sorted((found for file in files if (found := _read(file)).step <= last), key=lambda found: found.step)
    loss = record.get("loss")
    loss = math.nan if loss is None else float(loss)
    return Course(run, record["step"], record.get("tokens"), loss, held_out, bits, evaluated)


def _read(file: Path) -> Evaluated:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        scores = {task: _scores(metrics) for task, metrics in content["results"].items()}
        about = content["checkpoint"]
        return Evaluated(about["step"], about["tokens"], scores, content["task_hashes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MegalmError(f"{file} is not what tools/evaluate_model.py writes ({error}): evaluate again") from None


def _scores(metrics: dict[str, Any]) -> dict[str, Score]:
    """{"acc,none": 0.4, "acc_stderr,none": 0.1} -> {"acc": Score(0.4, 0.1)}; a filter other than none stays named."""
    found = {}
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        found[shown] = Score(float(value), float(error) if isinstance(error, int | float) else math.nan)
    return found


def main_metric(metrics: dict[str, Score]) -> str | None:
    """The metric to draw of a task; None if it has none."""
    known = [metric for name in MAIN for metric in metrics if metric.partition(" ")[0] == name]
    return next(iter(known or metrics), None)


def table(names: list[str], courses: list[Course]) -> str:
    """A row per quantity, a column per run. A task whose questions are not the same in all is marked with *."""
    rows = [
        ["", *names],
        ["step", *(f"{course.step:,}" for course in courses)],
        ["tokens", *(format_count(math.nan if course.tokens is None else course.tokens) for course in courses)],
        ["loss", *(_number(course.loss) for course in courses)],
    ]
    for what, key in (("held out", "held_out"), ("bits per byte", "bits_per_byte")):
        for corpus in dict.fromkeys(corpus for course in courses for corpus in getattr(course, key)):
            values = [getattr(course, key).get(corpus) for course in courses]
            rows.append([f"{what}: {corpus}", *map(_number, values)])
    last = [course.evaluated[-1] if course.evaluated else None for course in courses]
    if any(last):
        rows.append(["evaluated at step", *(f"{each.step:,}" if each else "-" for each in last)])
    for task in dict.fromkeys(task for each in last if each for task in each.scores):
        mine = [each for each in last if each and task in each.scores]
        mark = "*" if len({each.hashes.get(task) for each in mine}) > 1 else ""
        for metric in dict.fromkeys(metric for each in mine for metric in each.scores[task]):
            scores = [each.scores.get(task, {}).get(metric) if each else None for each in last]
            rows.append([f"{task}{mark} {metric}", *map(_score, scores)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    if any("* " in row[0] for row in rows):
        lines.append("* not the same questions in all of them")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4f}" + (f" ±{score.error:.4f}" if math.isfinite(score.error) else "")
