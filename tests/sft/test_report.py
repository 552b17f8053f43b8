"""The page of a run, made from made-up records and predictions."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megalm.errors import MegalmError
from megalm.sft import report
from megalm.sft.page import columns, shades
from megalm.sft.report import Prediction, Predictions, read_predictions, write_predictions, write_report

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LABELS = ["体育", "财经", "<b>科技</b>"]


def rows() -> list[Prediction]:
    """Twelve, of which every fourth is wrong."""
    made = []
    for n in range(12):
        true = LABELS[n % 3]
        said = LABELS[(n + 1) % 3] if n % 4 == 0 else true
        made.append(Prediction(f"第{n}条新闻 & more", true, said, 0.5 + n / 100, n / 10, "dev.jsonl", n + 1))
    return made


def make_run(folder: Path, predicted: list[Prediction] | None = None, kind: str = "text_classification") -> Path:
    """A run of 60 steps, evaluated at every tenth: the accuracy is best at 40, the loss at 60."""
    folder.mkdir(parents=True)
    config = {"task": {"kind": kind}, "evaluate": {"metric": "accuracy", "greater_is_better": None}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    accuracy = {10: 0.5, 20: 0.6, 30: 0.7, 40: 0.9, 50: 0.9, 60: 0.8}
    lines = []
    for step in range(1, 61):
        record: dict[str, Any] = {
            "step": step,
            "loss": 3 / step + 0.2,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "tokens": 100 * step,
        }
        if step in accuracy:
            record |= {"held_out": {"dev": 2 / step}, "scores": {"dev": {"accuracy": accuracy[step], "macro_f1": None}}}
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if predicted is not None:
        for step in (30, 40, 60):
            shown = predicted if step == 40 else [Prediction("elsewhere", LABELS[0], LABELS[0])]
            write_predictions(folder, Predictions(step, kind, LABELS, {"dev": shown}))
    return folder


class Balanced(HTMLParser):
    """Tags that are open, and texts; refuses a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data.strip()


def test_the_report_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows())
    page = write_report(run, 5).read_text(encoding="utf-8")
    made = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert made["best_step"] == made["predictions_step"] == 40, "the first of the best, and its predictions"
    assert [each["step"] for each in made["evaluations"]] == [10, 20, 30, 40, 50, 60]
    dev = made["corpora"]["dev"]
    assert dev["rows"] == 12 and dev["right"] == 9
    assert dev["confusion"] == [[3, 1, 0], [0, 3, 1], [1, 0, 3]]
    assert dev["per_class"]["体育"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4}
    assert [row["row"] for row in dev["worst"]] == [12, 11, 10, 9, 8], "the highest loss first"
    assert [row["is_right"] for row in dev["worst"]] == [True, True, True, False, True]

    parsed = Balanced()
    parsed.feed(page)
    assert not parsed.open
    assert "第11条新闻 & more" in parsed.cells and "dev.jsonl:12" in parsed.cells
    assert "<b>科技</b>" in parsed.cells and "<b>" not in page, "what is data is never markup"
    assert page.count('class="best"') == 1
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|<script", page), "nothing is fetched"
    pictures = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(pictures) == 2 and all(p.startswith(b"\x89PNG") and len(p) > 5000 for p in pictures)


def test_a_run_without_predictions_or_evaluations_has_a_report_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report(run).read_text().count("<img") == 2
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / "config.yaml").unlink()
    assert "has not been evaluated yet" in write_report(run).read_text()
    made = json.loads((run / "report.json").read_text())
    assert made["best_step"] is None and made["metric"] == "loss" and made["corpora"] == {}


def test_what_the_run_chose_is_the_best() -> None:
    records = [
        {"step": 1, "held_out": {"a": 1.0}, "selection": {"best": 1.0, "best_step": 1}},
        {"step": 2, "held_out": {"a": None}, "selection": {"best": 1.0, "best_step": 1}},
        {"step": 3, "held_out": {"a": 2.0}, "selection": {"best": 2.0, "best_step": 3}, "stopped_early": True},
    ]
    made = report.evaluations(records, {})
    assert made["best_step"] == 3 and made["stopped_early"], "as after a comparison that began anew"
    assert report.evaluations([{k: v for k, v in r.items() if k != "selection"} for r in records], {})["best_step"] == 1


def test_predictions_come_back(tmp_path: Path) -> None:
    odd = Prediction("x", ["B-PER"], ["O"], np.float32(0.5), float("nan"), None, np.int64(3))
    file = write_predictions(tmp_path, Predictions(7, "token_classification", [], {"dev": [odd]}))
    assert file == tmp_path / "predictions" / "step-7.json"
    found = read_predictions(tmp_path, 99)
    assert (
        found is not None
        and found.step == 7
        and found.corpora["dev"] == [Prediction("x", ["B-PER"], ["O"], 0.5, None, None, 3)]
    )
    assert read_predictions(tmp_path / "nowhere") is None
    file.write_text(file.read_text()[:20])
    with pytest.raises(MegalmError, match="step-7.json is not a file of predictions"):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    ("kind", "row", "classes", "right"),
    [
        ("token_classification", Prediction("x", ["B-PER", "O"], ["B-PER", "O"]), ["PER"], True),
        ("text_classification", Prediction("x", ["体育"], ["体育", "财经"]), LABELS, False),
        ("question_answering", Prediction("x", ["北京", "北京市"], "北京市"), None, True),
        ("question_answering", Prediction("x", [], ""), None, True),
        ("question_answering", Prediction("x", ["北京"], "京"), None, False),
        ("translation", Prediction("x", "你好", "您好"), None, False),
    ],
)
def test_every_kind_of_answer(kind: str, row: Prediction, classes: list[str] | None, right: bool) -> None:
    found = report.details(kind, LABELS, [row])
    assert (list(found.per_class) if found else None) == classes
    assert report.is_right(row) == right


def test_without_losses_the_worst_are_the_surest_mistakes() -> None:
    made = [Prediction(f"{n}", "a", "b" if n % 2 else "a", n / 10) for n in range(6)]
    assert [row.text for row in report.worst(made, 2)] == ["5", "3"]


def test_shades_and_columns() -> None:
    assert shades([[1, 3], [0, 0]]) == [[0.25, 0.75], [0.0, 0.0]]
    assert columns([{"metrics": {"loss": {"a": 1}}}, {"metrics": {"loss": {"b": 1}, "f1": {"a": 1}}}]) == [
        ("loss", "a"),
        ("loss", "b"),
        ("f1", "a"),
    ]


def test_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows())

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(REPOSITORY / "tools" / "report_run.py"), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True)

    ended = command(run, "--worst", 3)
    assert (ended.returncode, ended.stdout.strip()) == (0, str(run / "report.html")), ended.stderr
    assert len(json.loads((run / "report.json").read_text())["corpora"]["dev"]["worst"]) == 3
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    refused = command(run)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: cannot write {run / 'report.html'} (Is a directory): make room for it\n",
    )
    refused = command(tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: {tmp_path} has no metrics.jsonl")
