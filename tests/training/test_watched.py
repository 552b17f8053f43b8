"""What a run tells those who watch it: where it is, which rank is slow, which samples it skipped, what does not fit."""

import json
import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.metrics.events import TRAINER, read_events, write_event
from megalm.training.callbacks.anomalies import SKIPPED
from megalm.training.callbacks.stragglers import Stragglers, slow
from megalm.training.whereabouts import FILE, Whereabouts
from tests.distributed.ranks import RankFailed, run_ranks
from tests.training.runs import NaNAt, train_run


def trouble(run: Any) -> None:
    """The third step is not a number, the last rank is slow, and its notes are kept."""
    NaNAt(2)(run)
    if run.groups.rank != run.groups.size - 1:
        return
    notes: list[str] = []
    run.engine.note = notes.append
    right, loader = run.loader.__class__.__next__, run.loader

    class Slow:
        def __next__(self) -> Any:
            time.sleep(0.3)
            return right(loader)

        def close(self) -> None:
            loader.close()
            (run.directory / "notes.json").write_text(json.dumps(notes))

    run.loader = Slow()


def test_a_run_tells_where_it_is_who_is_slow_and_what_it_skipped(settings: Any) -> None:
    tree = settings(parallel={"pipeline": 2})
    tree["train"]["on_nan"] = "skip"
    assert run_ranks(2, partial(train_run, sabotage=trouble), tree) == [0, 0]
    run = Path(tree["run"]["directory"])
    notes = json.loads((run / "notes.json").read_text())
    assert notes[:3] == [
        "counting the tokens of the step",
        "pipeline receive of micro-batch 1 from rank 0",
        "loading of micro-batch 1",
    ]
    assert {"forward pass of micro-batch 4", "update of the weights", "evaluation"} <= set(notes)
    (skipped,) = [json.loads(line) for line in (run / SKIPPED).read_text().splitlines()]
    assert skipped["samples"] == list(range(32, 48)) and skipped["passed_over"] == [32, 48]
    assert (skipped["step"], skipped["why"], skipped["action"]) == (3, "nan", "skip")
    events = {event["event"]: event for event in read_events(run)}
    assert events["slow rank"]["rank"] == 1 and events["slow rank"]["seconds"] > 0.25
    assert len(events["ranks"]["p50"]) == 2 and events["anomaly"]["samples"] == 16
    assert [event["step"] for event in read_events(run) if event["event"] == "saved"] == [4, 8]
    said = (run / "said.txt").read_text()
    assert "rank 1 on " in said and "is slow: its own work takes" in said
    assert "2 ranks on 1 machine agree; all (2)" in said


def other_config(tree: dict[str, Any]) -> int:
    if os.environ["RANK"] == "1":
        tree = tree | {"schedule": tree["schedule"] | {"warmup_steps": 3}}
    return train_run(tree)


def test_ranks_with_another_config_are_refused(settings: Any) -> None:
    tree = settings()
    with pytest.raises(RankFailed, match="the config of rank 1 on .* is another than that of rank 0"):
        run_ranks(2, other_config, tree)


def test_who_is_slow() -> None:
    work = [(0, 0.1), (0, 0.11), (0, 0.3), (1, 0.5), (1, 0.5)]
    assert slow(work) == [(2, 0.3, pytest.approx(0.105))]
    assert slow([(0, 0.1), (1, 0.4)]) == [(1, 0.4, 0.1)], "a stage of one rank is held against all"
    assert not slow([(0, 0.001), (0, 0.01)]), "milliseconds are noise"


def test_nine_tenths_of_the_steps_are_no_slower_than_the_slowest(tmp_path: Path) -> None:
    """Of few steps too."""
    groups = SimpleNamespace(size=2, stage=0, gather=lambda mine: [mine, mine])
    run: Any = SimpleNamespace(groups=groups, due=lambda every: True, is_main=True, step=1)
    run.event = lambda kind, **facts: write_event(tmp_path / TRAINER, kind, **facts)
    stragglers = Stragglers(every=1)
    for seconds in ([9.0, 1.0], [4.0], [2.0], [3.0]):  # after the first, which is not counted
        stragglers._seconds += seconds[:-1]
        stragglers.after_step(run, {"own_seconds": seconds[-1]})
    for event in read_events(tmp_path):
        assert event["p50"][0] <= event["p90"][0] <= event["max"][0]


@pytest.mark.parametrize(("every", "size"), [(0, 2), (1000, 1)])
def test_ranks_that_are_not_compared_leave_nothing_behind(every: int, size: int) -> None:
    run: Any = SimpleNamespace(groups=SimpleNamespace(size=size))
    stragglers = Stragglers(every)
    for _ in range(3):
        stragglers.after_step(run, {"own_seconds": 1.0})
    assert stragglers._seconds == []


def test_whereabouts_overwrite_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "where"))
    where = Whereabouts.of_environment()
    where.note("a long story about what is being done")
    where.step = 7
    where.note("data loading")
    note = json.loads((tmp_path / "where").read_bytes())
    assert (note["n"], note["step"], note["at"]) == (2, 7, "data loading")
    monkeypatch.delenv(FILE)
    Whereabouts.of_environment().note("nobody listens")
