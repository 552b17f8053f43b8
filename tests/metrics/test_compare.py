"""Runs side by side: what the table says, and what is drawn."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import MegalmError
from megalm.metrics.compare import main_metric, read_course, table
from megalm.metrics.plot import plot_scores, short_names


def make_run(folder: Path, loss: float, evaluations: dict[int, dict[str, Any]], questions: str = "same") -> Path:
    (folder / "evaluation").mkdir(parents=True)
    records = [
        {"step": step, "tokens": 1000 * step, "loss": loss + 1 / step, "lr": 1e-3, "grad_norm": 1.0}
        for step in range(1, 11)
    ]
    records[4] |= {"held_out": {"web": 3.5}, "bits_per_byte": {"web": 1.25}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step, results in evaluations.items():
        content = {
            "checkpoint": {"step": step, "tokens": 1000 * step},
            "results": results,
            "task_hashes": dict.fromkeys(results, questions),
        }
        (folder / "evaluation" / f"step-{step}.json").write_text(json.dumps(content))
    return folder


QUIZ = {"alias": "quiz", "acc,none": 0.25, "acc_stderr,none": 0.05, "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"}
BETTER = QUIZ | {"acc,none": 0.75}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = make_run(tmp_path / "first", 2.0, {5: {"quiz": QUIZ}, 10: {"quiz": BETTER}})
    second = make_run(tmp_path / "second", 1.0, {10: {"quiz": QUIZ, "lines": {"exact_match,strip": 0.125}}}, "others")
    return [first, second, make_run(tmp_path / "third", 3.0, {})]


def test_the_table(runs: list[Path]) -> None:
    text = table(short_names(runs), [read_course(run) for run in runs])
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert words == [
        "first second third",
        "step 10 10 10",
        "tokens 10K 10K 10K",
        "loss 2.1000 1.1000 3.1000",
        "held out: web 3.5000 3.5000 3.5000",
        "bits per byte: web 1.2500 1.2500 1.2500",
        "evaluated at step 10 10 -",
        "quiz* acc 0.7500 ±0.0500 0.2500 ±0.0500 -",
        "quiz* acc_norm 0.5000 0.5000 -",
        "lines exact_match (strip) - 0.1250 -",
        "* not the same questions in all of them",
    ]


def test_up_to_a_checkpoint(runs: list[Path]) -> None:
    early = read_course(runs[0] / "checkpoints" / "step-5")
    assert early.step == 5 and early.loss == pytest.approx(2.2) and early.run == runs[0].resolve()
    assert [each.step for each in early.evaluated] == [5]
    assert [each.step for each in read_course(runs[0]).evaluated] == [5, 10]
    earlier = read_course(runs[0] / "checkpoints" / "step-4")
    assert not earlier.held_out and not earlier.evaluated


def test_the_metric_that_is_drawn(runs: list[Path]) -> None:
    (first, _), second = read_course(runs[0]).evaluated, read_course(runs[1]).evaluated[0]
    assert main_metric(first.scores["quiz"]) == "acc_norm"
    assert main_metric(second.scores["lines"]) == "exact_match (strip)"
    assert main_metric({}) is None


def test_the_pictures(runs: list[Path], tmp_path: Path) -> None:
    courses = [read_course(run) for run in runs]
    assert plot_scores(["a", "b", "c"], courses, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 10_000
    assert not plot_scores(["c"], courses[2:], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    with pytest.raises(MegalmError, match=r"end its name in .png"):
        plot_scores(["a", "b", "c"], courses, tmp_path / "scores.word")


def test_what_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match="nowhere has no metrics.jsonl"):
        read_course(tmp_path / "nowhere")
    with pytest.raises(MegalmError, match="no records up to the step"):
        read_course(runs[0] / "checkpoints" / "step-0")
    (runs[0] / "evaluation" / "step-5.json").write_text("{}")
    with pytest.raises(MegalmError, match=r"step-5.json is not what tools/evaluate_model.py writes"):
        read_course(runs[0])


def test_the_command(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.compare_runs import main

    pictures = ["--output", tmp_path / "curves.png", "--scores", tmp_path / "scores.png"]
    paths = [runs[0], runs[0] / "checkpoints" / "step-5", runs[1]]
    monkeypatch.setattr("sys.argv", ["compare_runs.py", *map(str, [*paths, *pictures])])
    main()
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["first", "step-5", "second"] and out[-2:] == [str(pictures[1]), str(pictures[3])]
    assert all(Path(picture).stat().st_size > 10_000 for picture in pictures[1::2])
    for option in ("--output", "--scores"):
        monkeypatch.setattr(
            "sys.argv", ["compare_runs.py", *map(str, [*paths, option, tmp_path / "curves.png" / "x.png"])]
        )
        with pytest.raises(
            MegalmError, match=rf"cannot write .*x.png \(.*: make room for it, or name another {option}$"
        ):
            main()
