"""The best evaluation's checkpoint is kept, a run without progress stops, and neither is forgotten by a death."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from megalm.checkpoint import folder as checkpoints
from megalm.data.index import ShardReader
from megalm.errors import MegalmError
from megalm.metrics.compare import read_course
from megalm.metrics.records import evaluated
from megalm.training.callbacks.evaluation import Evaluation
from megalm.training.callbacks.selection import Selection
from megalm.training.config import EvaluateSection, RunConfig
from megalm.training.run import ANOMALY, DONE, PREEMPTED, Run
from tests.distributed.ranks import RankFailed, run_ranks
from tests.training.runs import CrashAt, curve, train_run

Settings = Callable[..., dict[str, Any]]
NAN = float("nan")


class StandIn:
    """A run of 100 steps."""

    is_last_step = Run.is_last_step
    due = Run.due
    is_main, rank = True, 0

    def __init__(self) -> None:
        self.step, self.stop, self.best = 0, None, None
        self.said: list[str] = []
        self.say = self.said.append
        train = type("Train", (), {"steps": 100, "global_batch_size": 16})
        self.config = type("Config", (), {"train": train, "run": type("Section", (), {"directory": "nowhere"})})
        self.groups = self

    def decide(self, question: Callable[[], Any]) -> Any:
        return question()


def evaluate(selection: Selection, run: StandIn, *values: float, score: str | None = None) -> dict[str, Any]:
    """A step with an evaluation that says `values` of corpora a, b, ...; its record."""
    run.step += 1
    said = dict(zip("abc", values))
    record: dict[str, Any] = {"step": run.step}
    record |= {"scores": {name: {score: value} for name, value in said.items()}} if score else {"held_out": said}
    selection.after_step(run, record)  # type: ignore[arg-type]
    return record


def test_less_loss_and_more_accuracy_are_better() -> None:
    for section, score, best in (({}, None, 2), ({"metric": "accuracy"}, "accuracy", 3)):
        selection, run = Selection(EvaluateSection(patience=9, **section)), StandIn()
        records = [evaluate(selection, run, value, score=score) for value in (0.5, 0.2, 0.7, 0.7, NAN, 0.6)]
        assert [record["selection"]["best_step"] for record in records][-1] == best
        assert records[-1]["selection"]["since"] == 6 - best, "what is as good is not better, nor is what is no number"
        assert run.best is None, "nothing is to be kept"
    turned, run = Selection(EvaluateSection(patience=9, greater_is_better=True)), StandIn()
    assert [evaluate(turned, run, value)["selection"]["best_step"] for value in (0.5, 0.2, 0.7)] == [1, 1, 3]


def test_several_corpora_count_by_their_mean() -> None:
    selection, run = Selection(EvaluateSection(patience=1)), StandIn()
    evaluate(selection, run, 1.0, 3.0)
    record = evaluate(selection, run, 1.5, 1.5)
    assert record["selection"] == {"value": 1.5, "best": 1.5, "best_step": 2, "since": 0}
    assert evaluated({"scores": {"a": {"f1": 1.0}, "b": {"f1": 0.0}}}) == {"f1": {"a": 1.0, "b": 0.0}}


def test_patience_counts_evaluations_not_steps() -> None:
    selection, run = Selection(EvaluateSection(patience=2)), StandIn()
    evaluate(selection, run, 1.0)
    selection.after_step(run, {"step": 7})  # type: ignore[arg-type]
    assert "stopped_early" not in evaluate(selection, run, 2.0) and run.stop is None
    assert evaluate(selection, run, 2.0)["stopped_early"] and run.stop == DONE


@pytest.mark.parametrize("kept", [True, False])
def test_a_rollback_takes_evaluations_back(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come again; those of a course that the run has left are no reason to stop, and its best is gone."""
    selection, run = Selection(EvaluateSection(patience=4, keep_best=kept)), StandIn()
    evaluate(selection, run, 2.0)
    evaluate(selection, run, 3.0)
    saved = {"Selection": selection.state()}
    manifests = {"nowhere/checkpoints/step-2": SimpleNamespace(trainer=saved)}
    monkeypatch.setattr(checkpoints, "read", lambda folder: manifests[str(folder).removeprefix(f"{Path.cwd()}/")])
    for course in (4.0, 1.0):
        evaluate(selection, run, course)
        evaluate(selection, run, 5.0)
        run.step = 2
        record = {"step": 5, "held_out": {"a": 9.0}, "rolled_back": True}
        selection.after_step(run, record)  # type: ignore[arg-type]
        assert "selection" not in record and run.stop is None
    assert run.best == (1 if kept else None)
    assert evaluate(selection, run, 1.5)["selection"] == {"value": 1.5, "best": 1.5, "best_step": 3, "since": 0}
    saved.clear()
    run.step = 2
    selection.after_step(run, {"step": 3, "rolled_back": True})  # type: ignore[arg-type]
    assert run.best is None and evaluate(selection, run, 7.0)["selection"]["best"] == 7.0


@pytest.mark.parametrize(("stop", "step", "expected"), [(PREEMPTED, 5, DONE), (ANOMALY, 5, ANOMALY), (None, 99, None)])
def test_who_else_ends_the_run(stop: int | None, step: int, expected: int | None) -> None:
    selection, run = Selection(EvaluateSection(patience=1)), StandIn()
    evaluate(selection, run, 1.0)
    run.stop, run.step = stop, step
    evaluate(selection, run, 2.0)
    assert run.stop == expected, "the last step ends it anyway"


def test_another_metric_starts_the_comparison_anew() -> None:
    first, run = Selection(EvaluateSection(patience=1)), StandIn()
    evaluate(first, run, 1.0)
    evaluate(first, run, 2.0)
    same, other = Selection(EvaluateSection(patience=1)), Selection(EvaluateSection(patience=1, metric="accuracy"))
    for selection in (same, other):
        selection.restore(first.state())
    assert same.state() == first.state()
    run.stop = None
    other.on_start(run)  # type: ignore[arg-type]
    assert run.stop is None and "evaluate.metric was loss (less is better)" in run.said[-1]
    same.on_start(run)  # type: ignore[arg-type]
    assert run.stop == DONE


def test_a_metric_that_no_evaluation_says_is_refused() -> None:
    selection, run = Selection(EvaluateSection(patience=1, metric="f1")), StandIn()
    with pytest.raises(MegalmError, match=r"step 1: evaluate.metric f1 is not among .* \(loss\)"):
        evaluate(selection, run, 1.0)


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"metric": "acuracy"}, "acuracy is not one of megalm's"),
        ({"every": 3, "epochs": 1}, "exclude each other"),
        ({"metric": "accuracy", "patience": 1}, "\\(loss, bits_per_byte\\)"),
    ],
)
def test_mistakes_are_refused(settings: Settings, section: dict[str, Any], why: str) -> None:
    tree = settings()
    tree["evaluate"] = section
    with pytest.raises(ValidationError, match=why):
        RunConfig.model_validate(tree)
    assert EvaluateSection(metric="mine", greater_is_better=False).greater is False


def test_selection_needs_something_held_out(settings: Settings) -> None:
    tree = settings(evaluate={"keep_best": True}, data={"held_out": []})
    with pytest.raises(ValidationError, match="evaluate.keep_best needs something to evaluate"):
        RunConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("between", "expected"), [(40.0, [3, 5, 8, 10]), (16.0, list(range(1, 101))), (0.5, list(range(1, 101)))]
)
def test_evaluations_by_passes_over_the_data(between: float, expected: list[int]) -> None:
    """16 samples a step: 40 are passed in step 3, 80 in step 5, 120 in step 8."""
    evaluation, run = Evaluation(0, {}, between=between), StandIn()
    due = []
    for run.step in range(1, 101):
        if evaluation._due(run, {"samples": 16 * run.step}):  # type: ignore[arg-type]
            due.append(run.step)
    assert due[: len(expected)] == expected and due[-1] == 100


class Says:
    """Let the evaluation after each step say these losses, and do `more`."""

    def __init__(self, losses: dict[int, float], more: Callable[[Any], None] | None = None):
        self.losses, self.more = losses, more

    def __call__(self, run: Any) -> None:
        run.engine.evaluate = lambda batches: (self.losses[run.step], 1000)
        if self.more:
            self.more(run)


def said(tree: dict[str, Any]) -> str:
    return (Path(tree["run"]["directory"]) / "said.txt").read_text()


def folder(tree: dict[str, Any]) -> Path:
    return Path(tree["run"]["directory"]) / "checkpoints"


def test_the_best_checkpoint_is_kept(settings: Settings) -> None:
    tree = settings(checkpoint={"every": 4, "keep_last": 1})
    windows = (ShardReader(tree["data"]["sources"][0]["path"]).tokens_total - 1) // 32
    tree["evaluate"] = {"epochs": 41 / windows, "keep_best": True}
    losses = {3: 2.0, 6: 1.0, 8: 1.5}
    assert run_ranks(2, train_run, tree, Says(losses)) == [0, 0]
    assert checkpoints.steps(folder(tree)) == [6, 8], "step 3 was the best, 4 was due, 6 was the best"
    best = checkpoints.resolve(folder(tree) / "best")
    assert best.name == "step-6" and checkpoints.resolve(folder(tree)).name == "step-8"
    assert checkpoints.resolve(folder(tree) / "latest").name == "step-8"
    assert read_course(folder(tree) / "best").step == 6
    assert (
        f"best: loss 1 at step 6, kept; export it with: python tools/convert_checkpoint.py to-hf {folder(tree)}/best"
        in (said(tree))
    )
    selections = {record["step"]: record["selection"] for record in curve(tree) if "selection" in record}
    assert {step: selection["value"] for step, selection in selections.items()} == losses
    assert selections[8] == {"value": 1.5, "best": 1.0, "best_step": 6, "since": 1}
    # Gone back to the best one, the run continues from it.
    tree["checkpoint"] |= {"resume": str(folder(tree) / "best")}
    tree["evaluate"] = {"keep_best": True, "every": 1}
    assert run_ranks(1, train_run, tree, Says({7: 0.5, 8: 4.0})) == [0]
    assert checkpoints.steps(folder(tree)) == [7, 8] and (folder(tree) / "best").read_text() == "step-7\n"


def test_a_run_that_stopped_early_is_done(settings: Settings) -> None:
    tree = settings(evaluate={"every": 2, "patience": 2}, checkpoint={"every": 4})
    losses = {2: 1.0, 4: 2.0, 6: 1.0, 8: 0.5}
    assert run_ranks(1, train_run, tree, Says(losses)) == [0]
    first = curve(tree)
    assert [record["step"] for record in first] == [1, 2, 3, 4, 5, 6] and first[-1]["stopped_early"]
    assert checkpoints.steps(folder(tree)) == [4, 6]
    line = "stopped early at step 6: 2 evaluations in a row were not better than the best; the run is done"
    assert said(tree).count(line) == 1
    assert run_ranks(1, train_run, tree, Says(losses)) == [0], "given again"
    assert curve(tree) == first and said(tree).count(line) == 2
    tree["evaluate"]["patience"] = 3
    assert run_ranks(1, train_run, tree, Says(losses)) == [0], "negative control: with more patience it goes on"
    assert [record["step"] for record in curve(tree)] == list(range(1, 9))


def _die_before_naming(run: Any) -> None:
    """Die between the checkpoint of step 4, which is the best, and its name."""
    right = checkpoints.set_best

    def dying(directory: Path, step: int | None) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        right(directory, step)

    checkpoints.set_best = dying


def test_a_death_forgets_neither_the_best_nor_the_patience(settings: Settings) -> None:
    sections = {
        "evaluate": {"every": 1, "keep_best": True, "patience": 3},
        "checkpoint": {"every": 3, "keep_last": 1},
    }
    losses = dict(enumerate([5.0, 3.0, 4.0, 2.0, 2.5, 2.5, 2.5, 1.0], start=1))
    whole, tree = settings("whole", **sections), settings(**sections)
    assert run_ranks(1, train_run, whole, Says(losses)) == [0]
    assert [r["selection"]["since"] for r in curve(whole)] == [0, 0, 1, 0, 1, 2, 3]
    assert checkpoints.steps(folder(whole)) == [4, 7]
    with pytest.raises(RankFailed):
        run_ranks(1, train_run, tree, Says(losses, _die_before_naming))
    assert checkpoints.best(folder(tree)) == folder(tree) / "step-2"
    assert checkpoints.steps(folder(tree)) == [2, 3, 4], "nothing was removed before the new one had its name"
    with pytest.raises(RankFailed):
        run_ranks(1, train_run, tree, Says(losses, CrashAt(6)))
    assert checkpoints.best(folder(tree)) == folder(tree) / "step-4"
    assert run_ranks(1, train_run, tree, Says(losses)) == [0]
    assert curve(tree) == curve(whole)
    assert checkpoints.steps(folder(tree)) == [4, 7] and checkpoints.best(folder(tree)) == folder(tree) / "step-4"


def test_a_best_checkpoint_that_is_gone_is_not_missed_in_silence(settings: Settings) -> None:
    tree = settings(evaluate={"every": 2, "keep_best": True}, checkpoint={"every": 2})
    with pytest.raises(RankFailed):
        run_ranks(1, train_run, tree, Says({2: 3.0, 4: 1.0, 6: 2.0}, CrashAt(6)))
    checkpoints._delete(folder(tree) / "step-4")
    assert run_ranks(1, train_run, tree, Says({8: 2.5})) == [0]
    assert "the best evaluation, step-4, is gone: the next evaluation counts as the best so far" in said(tree)
    assert checkpoints.best(folder(tree)) == folder(tree) / "step-8"
