"""A disk that fills up while a checkpoint is written: one sentence on every rank, and nothing lost."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import weights
from megalm.errors import MegalmError
from tests.distributed.ranks import run_ranks
from tests.training.runs import curve, train_run

Settings = Callable[..., dict[str, Any]]


class FullAt:
    """No space left on rank `rank` for what `where` writes, once a checkpoint stands."""

    def __init__(self, where: str, rank: int):
        self.where, self.rank = where, rank

    def __call__(self, run: Any) -> None:
        if run.groups.rank != self.rank:
            return
        module, name = {"deepspeed": (torch, "save"), "weights": (weights, "save_file")}[self.where]
        right = getattr(module, name)

        def full(*args: Any, **kwargs: Any) -> Any:
            if run.step > 4:
                if self.where == "weights":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
            return right(*args, **kwargs)

        setattr(module, name, full)


def said_by_all(tree: dict[str, Any], sabotage: FullAt) -> str:
    """The one sentence in which the run ends on every rank."""
    try:
        train_run(tree, sabotage)
    except MegalmError as error:
        return str(error)
    raise AssertionError("the run went on")


@pytest.mark.parametrize(
    ("parallel", "where", "rank"),
    [
        ({"zero": 3}, "deepspeed", 1),
        ({"pipeline": 2}, "deepspeed", 0),
        ({"tensor": 2}, "weights", 1),
    ],
)
def test_one_rank_without_space_ends_all_in_one_sentence(
    settings: Settings, parallel: dict[str, Any], where: str, rank: int
) -> None:
    tree, whole = settings("full", parallel=parallel), settings("whole", parallel=parallel)
    first, second = run_ranks(2, said_by_all, tree, FullAt(where, rank), timeout=60)
    assert first == second
    directory = Path(tree["run"]["directory"]) / "checkpoints"
    cause = "No space left on device" if where == "weights" else "PytorchStreamWriter failed writing file"
    assert first.startswith(f"the checkpoint {directory}/step-8 could not be written (rank {rank}: {cause}")
    assert "\n" not in first
    assert checkpoints.steps(directory) == [4] and not list(directory.glob(".*"))
    if where == "weights":  # Room was made: the run goes on from step 4 as if nothing had happened.
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
    run.engine.num_parameters = 0


@pytest.mark.parametrize("measured", [True, False])
def test_a_disk_that_is_really_full(settings: Settings, small_disk: Path, measured: bool) -> None:
    # 1.3 MB a checkpoint: the second one fits, the third does not.
    tree = settings()
    tree["run"]["directory"] = str(small_disk)
    tree["checkpoint"] = {"every": 2}
    sabotage = None if measured else _unprepared
    said = run_ranks(2, partial(said_by_all, tree, sabotage), timeout=60)[0]  # type: ignore[arg-type]
    cause = "it takes about 0.0 GB" if measured else "PytorchStreamWriter|No space left|unexpected pos"
    assert said.startswith(f"the checkpoint {small_disk}/checkpoints/step-")
    assert any(part in said for part in cause.split("|")), said
    kept = checkpoints.newest(small_disk / "checkpoints")
    assert kept is not None
    checkpoints.verify(kept, checkpoints.Alone())
