"""A disk that fills up while a checkpoint is written: training goes on, it is counted, and nothing is lost."""

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import tensors
from megalm.errors import MegalmError
from megalm.metrics import plot, sinks
from megalm.training import run as runs
from tests.distributed.ranks import run_ranks
from tests.training.runs import curve, state, train_run

Settings = Callable[..., dict[str, Any]]


class FullAt:
    """No space left on rank `rank` for what it writes of the checkpoints of `steps`."""

    def __init__(self, rank: int, *steps: int):
        self.rank, self.steps = rank, steps

    def __call__(self, run: Any) -> None:
        if run.groups.rank != self.rank:
            return
        right = tensors.Snapshot.write

        def full(snapshot: Any, folder: Path, rank: int) -> Any:
            if folder.name in [f".step-{step}.partial" for step in self.steps]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return right(snapshot, folder, rank)

        tensors.Snapshot.write = full  # type: ignore[method-assign]


class NoRecordsAt:
    """No space left for records, events and pictures at `steps`."""

    def __init__(self, *steps: int):
        self.steps = steps

    def __call__(self, run: Any) -> None:
        right = sinks.JsonlSink._flush

        def full(sink: Any) -> None:
            if run.step in self.steps:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            right(sink)

        def nowhere(*arguments: Any, **facts: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sinks.JsonlSink._flush = full  # type: ignore[method-assign]
        plot.plot_runs = nowhere  # type: ignore[assignment]
        runs.write_event = nowhere  # type: ignore[assignment]


def said_by_all(tree: dict[str, Any], sabotage: Any) -> str:
    """The one sentence in which the run ends on every rank."""
    try:
        train_run(tree, sabotage)
    except MegalmError as error:
        return str(error)
    raise AssertionError("the run ended well")


def said(tree: dict[str, Any]) -> str:
    return (Path(tree["run"]["directory"]) / "said.txt").read_text()


@pytest.mark.parametrize(
    ("parallel", "rank"),
    [({"zero": 3}, 1), ({"pipeline": 2}, 0), ({"tensor": 2}, 1)],
    ids=["data", "pipeline", "tensor"],
)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_without_a_checkpoint(
    settings: Settings, parallel: dict[str, Any], rank: int, asynchronous: bool
) -> None:
    more = {"checkpoint": {"every": 2, "asynchronous": asynchronous}, "parallel": parallel}
    tree, whole = settings("full", **more), settings("whole", **more)
    assert run_ranks(2, partial(train_run, sabotage=FullAt(rank, 4, 6)), tree) == [0, 0]
    directory = Path(tree["run"]["directory"]) / "checkpoints"
    assert checkpoints.steps(directory) == [2, 8] and not list(directory.glob(".*"))
    for step, count in ((4, 1), (6, 2)):
        assert re.search(
            rf"warning: the checkpoint {directory}/step-{step} could not be written \(rank {rank}: No space left on "
            rf"device; .* GB are free\); training goes on with {directory}/step-2 as the newest one "
            rf"\({count} not written so far\)",
            said(tree),
        )
    assert run_ranks(2, train_run, whole) == [0, 0]
    records = curve(tree)
    assert records[-1].pop("failed_saves") == 2
    assert [{k: v for k, v in r.items() if k != "failed_saves"} for r in records] == curve(whole)
    assert all(torch.equal(tensor, state(whole, 8)[key]) for key, tensor in state(tree, 8).items())


def test_a_run_that_ends_without_its_checkpoint_is_an_error(settings: Settings) -> None:
    tree, whole = settings("full"), settings("whole")
    first, second = run_ranks(2, said_by_all, tree, FullAt(1, 8), timeout=60)
    assert first == second and "\n" not in first
    directory = Path(tree["run"]["directory"]) / "checkpoints"
    assert first.startswith(f"the checkpoint {directory}/step-8 could not be written (rank 1: No space left on device")
    assert first.endswith(
        "make room, or choose another run.directory, and start again; the run continues from its newest checkpoint"
    )
    assert checkpoints.steps(directory) == [4] and not list(directory.glob(".*"))
    # Room was made: the run goes on from step 4 as if nothing had happened.
    assert run_ranks(2, train_run, tree) == [0, 0]
    assert run_ranks(2, train_run, whole) == [0, 0]
    assert curve(tree) == curve(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _unprepared(run: Any) -> None:
    """Somebody else fills the disk after room was measured."""
    run.checkpoint_bytes = 0


@pytest.mark.parametrize("measured", [True, False])
def test_a_disk_that_is_really_full(settings: Settings, small_disk: Path, measured: bool) -> None:
    # 0.9 MB a checkpoint: three fit, the fourth, which is the last, does not.
    tree = settings()
    tree["run"]["directory"] = str(small_disk)
    tree["checkpoint"] = {"every": 2}
    sabotage = None if measured else _unprepared
    sentence = run_ranks(2, partial(said_by_all, tree, sabotage), timeout=60)[0]  # type: ignore[arg-type]
    cause = "it takes about 0.0 GB" if measured else "No space left on device"
    assert sentence.startswith(f"the checkpoint {small_disk}/checkpoints/step-8 could not be written (rank ")
    assert cause in sentence
    kept = checkpoints.newest(small_disk / "checkpoints")
    assert kept is not None
    checkpoints.verify(kept, checkpoints.Alone())


def test_a_run_without_any_record_ends_well(settings: Settings) -> None:
    """There is nothing to draw then."""
    tree = settings()
    never = NoRecordsAt(*range(9))
    assert run_ranks(1, partial(train_run, sabotage=never, picture=True), tree) == [0]
    assert "curve:" not in said(tree)


def test_training_goes_on_without_records_and_writes_them_later(settings: Settings) -> None:
    tree, whole = settings("full", checkpoint={"every": 2}), settings("whole", checkpoint={"every": 2})
    assert run_ranks(1, partial(train_run, sabotage=NoRecordsAt(3, 4, 5), picture=True), tree) == [0]
    assert run_ranks(1, train_run, whole) == [0]
    assert curve(tree) == curve(whole)
    assert said(tree).count("cannot be written ([Errno 28] No space left on device); training goes on") == 1
