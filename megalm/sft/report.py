"""What a fine-tuned model said, kept beside the run, and a page about the run: RUN/report.html and RUN/report.json.

RUN/predictions/step-N.json, of an evaluation after step N:

    {"step": N, "kind": task.kind, "labels": [class, ...], "corpora": {corpus: [row, ...]}}

A row is a Prediction. reference and prediction are as megalm/sft/metrics.py takes them: a label, a list of labels, a
list of tags, a text, or a list of accepted answers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megalm.errors import MegalmError
from megalm.metrics.records import Record, evaluated, read_records
from megalm.sft import metrics
from megalm.sft.metrics import ClassDetails

FOLDER = "predictions"


@dataclass(frozen=True)
class Prediction:
    """What a model said to something that a row asks. text: what it read, for a reader. confidence: the probability it
    gave its prediction. loss: of the reference, in nats. file, row: where it stands in the data, rows from 1."""

    text: str
    reference: Any
    prediction: Any
    confidence: float | None = None
    loss: float | None = None
    file: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Predictions:
    """A file of them."""

    step: int
    kind: str
    labels: Sequence[str]
    corpora: Mapping[str, Sequence[Prediction]]


def write_predictions(run: Path, predictions: Predictions) -> Path:
    """Write RUN/predictions/step-N.json, whole or not at all; one process calls it."""
    file = run / FOLDER / f"step-{predictions.step}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(_plain(asdict(predictions)), ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, file)
    return file


def read_predictions(run: Path, step: int | None = None) -> Predictions | None:
    """Those of a step if they were kept, else the newest, or None if there are none. Raises MegalmError for a damaged
    file."""
    files = {int(file.stem.removeprefix("step-")): file for file in (run / FOLDER).glob("step-*.json")}
    if not files:
        return None
    file = files.get(step if step is not None else -1) or files[max(files)]
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        corpora = {name: [Prediction(**row) for row in rows] for name, rows in found.pop("corpora").items()}
        return Predictions(corpora=corpora, **found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MegalmError(f"{file} is not a file of predictions ({error}): remove it") from error


def details(kind: str, labels: Sequence[str], rows: Sequence[Prediction]) -> ClassDetails | None:
    """Scores of each class, where a task has classes."""
    references, predictions = [row.reference for row in rows], [row.prediction for row in rows]
    if not rows:
        return None
    if kind == "token_classification":
        return metrics.entity_details(references, predictions)
    if kind in ("text_classification", "pair_classification", "relation_extraction"):
        several = isinstance(references[0], list)
        return (metrics.multi_label_details if several else metrics.class_details)(references, predictions, labels)
    return None


def worst(rows: Sequence[Prediction], count: int) -> list[Prediction]:
    """The examples of the highest loss; where losses are not known, those that are wrong, the surest first."""
    if all(row.loss is not None for row in rows):
        return sorted(rows, key=lambda row: -(row.loss or 0.0))[:count]
    wrong = [row for row in rows if not is_right(row)]
    return sorted(wrong, key=lambda row: -(row.confidence or 0.0))[:count]


def is_right(row: Prediction) -> bool:
    """Whether a prediction is its reference, or one of the accepted answers (none: the empty one)."""
    accepted = isinstance(row.reference, list) and not isinstance(row.prediction, list)
    return row.prediction in (row.reference or [""]) if accepted else row.prediction == row.reference


def evaluations(records: Sequence[Record], config: Mapping[str, Any]) -> dict[str, Any]:
    """Every evaluation, and which is the best: {metric, greater_is_better, best_step, stopped_early, evaluations}.

    config: the run's tree. The best is the one that the run itself chose; else what it would have chosen.
    """
    section = config.get("evaluate") or {}
    metric = section.get("metric") or "loss"
    greater = section.get("greater_is_better")
    greater = metrics.GREATER_IS_BETTER.get(metric, True) if greater is None else greater
    found, best, best_step = [], None, None
    for record in records:
        if not (said := evaluated(record)):
            continue
        values = [value for value in said.get(metric, {}).values() if value is not None]
        value = sum(values) / len(values) if values else None
        if value is not None and (best is None or (value > best if greater else value < best)):
            best, best_step = value, record["step"]
        chosen = record.get("selection") or {}
        best, best_step = chosen.get("best", best), chosen.get("best_step", best_step)
        found.append({"step": record["step"], "value": value, "metrics": said})
    return {
        "metric": metric,
        "greater_is_better": greater,
        "best_step": best_step,
        "stopped_early": bool(records and records[-1].get("stopped_early")),
        "evaluations": found,
    }


def gather(run: Path, count: int = 20) -> dict[str, Any]:
    """What report.json holds: the selection (evaluations()), and of the best evaluation whose predictions were kept,
    scores per class and the `count` worst examples of every corpus.

    Raises MegalmError for a folder that is not a run's, or has no records yet.
    """
    metrics_file, config_file = run / "metrics.jsonl", run / "config.yaml"
    if not metrics_file.is_file():
        raise MegalmError(f"{run} has no metrics.jsonl: name the folder of a run (run.directory)")
    records = list(read_records(metrics_file))
    if not records:
        raise MegalmError(f"{metrics_file} holds no records yet: wait for the run's first step")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    selection = evaluations(records, config)
    predictions = read_predictions(run, selection["best_step"])
    made: dict[str, Any] = {
        "run": str(run),
        "steps": records[-1]["step"],
        "task": (config.get("task") or {}).get("kind"),
        **selection,
        "predictions_step": predictions.step if predictions else None,
        "corpora": {},
    }
    for name, rows in (predictions.corpora if predictions else {}).items():
        assert predictions is not None
        classes = details(predictions.kind, predictions.labels, rows)
        made["corpora"][name] = {
            "rows": len(rows),
            "right": sum(map(is_right, rows)),
            "per_class": {label: asdict(scores) for label, scores in classes.per_class.items()} if classes else {},
            "labels": list(predictions.labels),
            "confusion": classes.confusion if classes else None,
            "worst": [asdict(row) | {"is_right": is_right(row)} for row in worst(rows, count)],
        }
    return made


def write_report(run: Path, count: int = 20) -> Path:
    """Write RUN/report.json and RUN/report.html; the path of the latter. Raises MegalmError as gather() does."""
    from megalm.sft.page import draw  # brings matplotlib, which what writes predictions can do without

    made = gather(run, count)
    (run / "report.json").write_text(
        json.dumps(_plain(made), ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    page = run / "report.html"
    page.write_text(draw(run, made), encoding="utf-8")
    return page


def _plain(value: Any) -> Any:
    """As JSON has it: numpy's numbers as Python's, what is not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value - value != 0 else value
