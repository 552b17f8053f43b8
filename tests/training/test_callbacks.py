"""Callbacks one by one, over a run that only says what they ask of it."""

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.data.index import ShardReader
from megalm.metrics import plot
from megalm.metrics.config import LoggingConfig
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.training.build import _held_out, _held_out_bytes, _short_names
from megalm.training.callbacks import anomalies, metrics
from megalm.training.callbacks.anomalies import Anomalies
from megalm.training.callbacks.checkpoints import Checkpoints
from megalm.training.callbacks.evaluation import Evaluation
from megalm.training.callbacks.garbage import GarbageCollection
from megalm.training.callbacks.metrics import Metrics
from megalm.training.config import RunConfig
from megalm.training.plan import plan
from megalm.training.run import ANOMALY, DONE, PREEMPTED, Callback, Run
from tests.distributed import sabotage
from tests.distributed.ranks import run_ranks
from tests.training.runs import NaNAt, curve, train_run

NAN = float("nan")
BYTES = {"web": 4000, "books": 0}


class StandIn:
    """A run of 100 steps of 16 samples at some step. directory: where it writes, if it does."""

    due, attempt, event, full = Run.due, Run.attempt, Run.event, False
    is_last_step = Run.is_last_step

    def __init__(self, step: int = 0, steps: int = 100, directory: Path | None = None) -> None:
        self.step, self.stop, self.best = step, None, None
        self.said: list[str] = []
        self.say = self.said.append
        self.directory, self.is_main = directory, directory is not None
        self.groups, self.sample_ids = Joined(0), [1, 0]
        train = type("Train", (), {"steps": steps, "global_batch_size": 16})
        self.config = type("Config", (), {"train": train, "task": None})
        self.held_out = {"web": ["batches of web"], "books": ["batches of books"]}
        self.evaluated: list[str] = []
        self.engine = self

    @property
    def data_state(self) -> dict[str, int]:
        return {"samples": 16 * self.step}

    def evaluate(self, batches: list[str]) -> tuple[float, int]:
        self.evaluated += batches
        return float(len(batches[0])), 1000


def policy(on_nan: str = "skip", on_spike: str = "skip", factor: float = 10.0, limit: int = 10) -> Anomalies:
    return Anomalies(on_nan, on_spike, factor, limit)


def step(anomalies: Anomalies, run: StandIn, norm: float, loss: float = 2.0) -> dict[str, Any]:
    """One step of the loop; its record. The optimizer is not called where the norm is not finite."""
    run.step += 1
    applied = math.isfinite(norm) and anomalies.accept(norm)
    record = {"step": run.step, "loss": loss, "grad_norm": norm, "applied": applied, "overflow": False}
    anomalies.after_step(run, record)  # type: ignore[arg-type]
    return record


def test_a_spike_needs_twenty_accepted_steps() -> None:
    judge, run = policy(), StandIn()
    for _ in range(5):
        assert step(judge, run, NAN)["anomalies"] == run.step, "what is not finite counts from the first step on"
    judge = policy()
    for norm in [1.0] * 19:
        assert judge.accept(norm)
    assert judge.accept(1000.0), "the twentieth is the last one without a judgement"
    judge = policy()
    for norm in [1.0] * 20:
        assert judge.accept(norm)
    assert not judge.accept(10.1) and judge.accept(10.0)


def test_the_mean_is_the_mean_at_first_and_forgets_later() -> None:
    judge = policy()
    for norm in (1.0, 2.0, 6.0):
        judge.accept(norm)
    assert judge.state()["mean"] == pytest.approx(3.0)
    for _ in range(47):
        judge.accept(3.0)
    assert judge.state()["mean"] == pytest.approx(3.0)
    judge.accept(4.0)
    assert judge.state()["mean"] == pytest.approx(3.0 + 0.02 * 1.0), "from 50 steps on the last ones count more"
    before = judge.state()
    assert not judge.accept(1000.0) and not judge.accept(NAN) and not judge.accept(math.inf)
    assert judge.state() == before, "what is declined does not move the mean"


@pytest.mark.parametrize(("kind", "norm"), [("nan", NAN), ("spike", 50.0)])
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_each_action(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, norm: float, action: str) -> None:
    monkeypatch.setattr(anomalies, "roll_back", lambda run: 15)
    judge, run = policy(**{f"on_{kind}": action}), StandIn(directory=tmp_path)
    for _ in range(20):
        assert "anomalies" not in step(judge, run, 1.0)
    record = step(judge, run, norm)
    assert not record["applied"] and record["anomalies"] == 1
    assert record.get("rolled_back", False) == (action == "rollback")
    [said] = run.said
    why = "not finite" if kind == "nan" else "a spike over the mean of 1"
    assert said.startswith(f"step 21: loss 2, gradient norm {norm:.4g} ({why}); ")
    assert run.stop == (ANOMALY if action == "stop" else None)
    written = json.loads((tmp_path / anomalies.SKIPPED).read_text())
    assert (written["step"], written["why"], written["action"], written["samples"]) == (21, kind, action, [0, 1])
    assert written["passed_over"] == [16 * (15 if action == "rollback" else 20), 16 * 21]
    assert {
        "stop": f"stopped before the update (train.on_{kind}=stop); set train.on_{kind}=skip or rollback to go past it",
        "skip": "skipped the update (1 so far)",
        "rollback": "rolled back to step 15, its samples are passed over (1 so far)",
    }[action] in said


def test_a_spike_may_be_ignored() -> None:
    judge, run = policy(on_spike="ignore"), StandIn()
    for _ in range(20):
        step(judge, run, 1.0)
    assert step(judge, run, 50.0) == {"step": 21, "loss": 2.0, "grad_norm": 50.0, "applied": True}
    assert not run.said and judge.anomalies == 0
    assert not step(judge, run, NAN)["applied"], "what is not finite is another matter"


def test_what_was_judged_before_says_nothing_of_a_step_that_is_not_finite() -> None:
    judge, run = policy(on_nan="stop", on_spike="skip"), StandIn()
    for norm in [1.0] * 20 + [50.0]:
        step(judge, run, norm)
    assert run.stop is None and "a spike" in run.said[-1]
    step(judge, run, NAN)
    assert run.stop == ANOMALY and "not finite" in run.said[-1]


def test_too_many_anomalies_stop_the_run() -> None:
    judge, run = policy(limit=2), StandIn()
    for _ in range(2):
        step(judge, run, NAN)
    assert run.stop is None
    step(judge, run, NAN)
    assert run.stop == ANOMALY and "stopped before the update (more than train.max_anomalies=2)" in run.said[-1]


def test_an_overflow_of_fp16_is_deepspeeds_own_affair() -> None:
    judge, run = policy(on_nan="stop"), StandIn()
    record = {"loss": 2.0, "grad_norm": math.inf, "applied": False}
    told = record | {"overflow": True}
    judge.after_step(run, told)  # type: ignore[arg-type]
    assert run.stop is None and judge.anomalies == 0
    assert told == record | {"overflows": 1}, "but it is counted"
    judge.after_step(run, record | {"overflow": False})  # type: ignore[arg-type]
    assert run.stop == ANOMALY, "where the loss scale cannot fall any more it is not"


def _fp16_run(tree: dict[str, Any]) -> int:
    sabotage.pretend_fp16()
    return train_run(tree, NaNAt(2))


@pytest.mark.parametrize("parallel", [{"zero": 1}, {"zero": 3}, {"pipeline": 2}])
def test_a_run_in_fp16_goes_past_an_overflow(settings: Callable[..., dict[str, Any]], parallel: dict[str, Any]) -> None:
    tree = settings(parallel=parallel)
    tree["train"]["precision"] = "fp16"
    assert run_ranks(2, _fp16_run, tree) == [0, 0], "train.on_nan is stop"
    records = curve(tree)
    assert [record["applied"] for record in records] == [True, True, False, True, True, True, True, True]
    assert not any("anomalies" in record for record in records)
    assert all(math.isfinite(record["loss"]) for record in records[3:])


def _always_nan(run: Any) -> None:
    for number in range(8):
        NaNAt(number)(run)


def _broken_fp16_run(tree: dict[str, Any]) -> int:
    sabotage.pretend_fp16()
    return train_run(tree, _always_nan)


@pytest.mark.parametrize("parallel", [{"zero": 1}, {"zero": 3}])
def test_what_no_loss_scale_mends_is_an_anomaly(
    settings: Callable[..., dict[str, Any]], parallel: dict[str, Any]
) -> None:
    tree = settings(parallel=parallel, deepspeed={"fp16": {"initial_scale_power": 2}})
    tree["train"]["precision"] = "fp16"
    assert run_ranks(1, _broken_fp16_run, tree) == [ANOMALY], "scales 4 and 2 are tried, then 1"
    last = curve(tree)[-1]
    assert (last["step"], last["overflows"], last["anomalies"]) == (3, 2, 1)


def test_a_resumed_policy_judges_as_the_uninterrupted_one() -> None:
    first, run = policy(), StandIn()
    for norm in [1.0] * 19 + [NAN]:
        step(first, run, norm)
    second = policy()
    second.restore(first.state())
    assert second.state() == first.state() == {"mean": 1.0, "accepted": 19, "anomalies": 1, "overflows": 0}
    for judge in (first, second):
        assert judge.accept(1.0) and not judge.accept(50.0)
    fresh = policy()
    assert fresh.accept(1.0) and fresh.accept(50.0), "negative control: it would not without the state"


def test_garbage_is_collected_at_its_steps_and_python_gets_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    run = StandIn()
    monkeypatch.setattr(gc, "collect", lambda: collected.append(run.step))
    callback = GarbageCollection(every=3)
    try:
        callback.on_start(run)  # type: ignore[arg-type]
        assert not gc.isenabled()
        for run.step in range(1, 8):
            callback.after_step(run, {})  # type: ignore[arg-type]
        assert collected == [0, 3, 6] and not gc.isenabled()
        callback.on_end(run)  # type: ignore[arg-type]
        assert gc.isenabled()
        off = GarbageCollection(every=0)
        off.on_start(run)  # type: ignore[arg-type]
        off.after_step(run, {})  # type: ignore[arg-type]
        assert gc.isenabled() and collected == [0, 3, 6]
    finally:
        gc.enable()


@pytest.mark.parametrize(("every", "expected"), [(4, [4, 8, 10]), (0, [10]), (5, [5, 10])])
def test_evaluation_is_due_at_its_steps_and_at_the_end(every: int, expected: list[int]) -> None:
    run, evaluated = StandIn(steps=10), []
    for run.step in range(1, 11):
        record: dict[str, Any] = {}
        Evaluation(every, BYTES).after_step(run, record)  # type: ignore[arg-type]
        if record:
            assert record["held_out"] == {"web": 14.0, "books": 16.0}
            # 1,000 tokens of 14 nats over 4,000 bytes
            assert record["bits_per_byte"] == {"web": pytest.approx(14 / math.log(2) / 4)}
            evaluated.append(run.step)
    assert evaluated == expected
    assert len(run.evaluated) == 2 * len(expected)
    record = {"rolled_back": True}
    Evaluation(every, BYTES).after_step(run, record)  # type: ignore[arg-type]
    assert record == {"rolled_back": True}, "weights of an earlier step are not this step's"
    run.held_out = {}
    record = {}
    Evaluation(every, BYTES).after_step(run, record)  # type: ignore[arg-type]
    assert record == {}, "nothing to evaluate, nothing to say"


def test_held_out_bytes_do_not_depend_on_the_layout(settings: Callable[..., dict[str, Any]]) -> None:
    """Of every layout they are the bytes of the text that all the evaluated tokens stand for, counted once."""
    tree = settings(evaluate={"sequences": 7})

    def counted(data: int, tensor: int) -> dict[str, int]:
        parallel = {"parallel": {"tensor": tensor}}
        planned = plan(RunConfig.model_validate(tree | parallel), data * tensor)
        ranks = [Joined(planned.layout.coordinates(rank)[1]) for rank in range(data * tensor)]
        batches = [_held_out(planned, rank)[0] for rank in ranks]  # type: ignore[arg-type]
        for rank, held_out in zip(ranks, batches):
            _held_out_bytes(planned, rank, held_out)  # type: ignore[arg-type]
        everyone = [rank.given for rank in ranks]
        ranks[0].others = everyone
        return _held_out_bytes(planned, ranks[0], batches[0])  # type: ignore[arg-type]

    alone = counted(1, 1)
    reader = ShardReader(tree["data"]["held_out"][0]["path"])
    windows = [int(number) for number in np.arange(7) * ((reader.tokens_total - 1) // 32) // 7]
    tokenizer = load(tree["data"]["tokenizer"])
    text = b"".join(_bytes(tokenizer, reader.tokens(32 * n + 1, 32 * n + 33)) for n in windows)
    assert alone["held_out"] == pytest.approx(len(text), rel=0.02), "characters cut by a window's end decode to more"
    assert counted(2, 1) == counted(1, 2) == counted(4, 2) == alone


class Joined:
    """A rank's groups, and what the ranks gather: `others`, or only its own."""

    def __init__(self, data_rank: int) -> None:
        self.data_rank, self.given, self.others = data_rank, None, None

    def gather(self, item: Any) -> list[Any]:
        self.given = item
        return self.others or [item]

    def decide(self, make: Callable[[], Any]) -> Any:
        return make()


def _bytes(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    return tokenizer.decode(ids).encode()


def test_checkpoints_are_due_at_their_steps_at_the_end_and_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    run, saved, settled = StandIn(steps=10), [], []
    where = "megalm.training.callbacks.checkpoints"
    monkeypatch.setattr(f"{where}.save", lambda run, wait: saved.append((run.step, wait)))
    monkeypatch.setattr(f"{where}.settle", lambda run, wait: settled.append((run.step, wait)))
    for run.step in range(1, 11):
        run.stop = PREEMPTED if run.step == 6 else ANOMALY if run.step == 7 else None
        Checkpoints(4).after_step(run, {})  # type: ignore[arg-type]
    Checkpoints(4).after_step(run, {"rolled_back": True})  # type: ignore[arg-type]
    assert saved == [(4, False), (6, True), (8, False), (10, True)], "only a run that ends waits for the disk"
    assert settled == [(step, False) for step in (1, 2, 3, 5, 7, 9, 10)]
    Checkpoints(4).on_end(run)  # type: ignore[arg-type]
    assert settled[-1] == (10, True)


def test_a_checkpoint_is_due_after_the_best_evaluation_and_at_an_early_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    run, saved = StandIn(steps=10), []
    where = "megalm.training.callbacks.checkpoints"
    monkeypatch.setattr(f"{where}.save", lambda run, wait: saved.append((run.step, wait)))
    monkeypatch.setattr(f"{where}.settle", lambda run, wait: None)
    for run.step, run.best, run.stop in ((3, 3, None), (4, 3, None), (5, 3, DONE)):
        Checkpoints(0).after_step(run, {})  # type: ignore[arg-type]
    assert saved == [(3, False), (5, True)]


def test_a_callback_needs_none_of_the_hooks() -> None:
    bare = Callback()
    assert bare.state() == {}
    for hook in (bare.on_start, bare.on_end):
        hook(StandIn())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], []),
        (["/data/web/held_out"], ["held_out"]),
        (["/data/web/held_out", "/data/books/held_out"], ["web/held_out", "books/held_out"]),
        (["/a/x/held_out", "/b/x/held_out", "/b/y/dev"], ["a/x/held_out", "b/x/held_out", "b/y/dev"]),
        (["held_out", "runs/held_out"], ["held_out", "runs/held_out"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_corpora_are_named_by_the_shortest_end_that_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert _short_names(paths) == names


def test_pictures_take_a_hundredth_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand seconds, a step and an evaluation in each; a picture takes two. The last is drawn anyhow."""
    clock, drawn = [0.0], []

    def draw(runs: list[Path], picture: Path) -> None:
        assert (runs, picture) == ([tmp_path], tmp_path / "loss.png")
        clock[0] += 2.0
        drawn.append(run.step)

    monkeypatch.setattr(plot, "plot_runs", draw)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    run = StandIn(steps=1000, directory=tmp_path)
    run.facts, run.tokens, run.failed_saves = {"model": "small"}, 0, 0
    run.config.run = run.config.model_dump = dict
    callback = Metrics(LoggingConfig(progress_bar="off"), torch.device("cpu"))
    callback.on_start(run)  # type: ignore[arg-type]
    for run.step in range(1, 1001):
        clock[0] += 1.0
        run.tokens += 16
        record = {"step": run.step, "tokens": run.tokens, "loss": 2.0, "lr": 1.0, "grad_norm": 1.0, "seconds": 1.0}
        callback.after_step(run, record | {"applied": True, "held_out": {"web": 2.0}})  # type: ignore[arg-type]
    callback.on_end(run)  # type: ignore[arg-type]
    assert drawn == [50, 250, 450, 650, 850, 1000]
