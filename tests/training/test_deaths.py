"""A run may die at any moment; nothing is lost (tests/training/deaths.py kills many more)."""

import random
from pathlib import Path

import pytest

from megalm.checkpoint import folder as checkpoints
from tests.distributed.ranks import run_ranks
from tests.training.conftest import tree_of
from tests.training.deaths import LAYOUTS, PLACES, SECTIONS, Death, compare, die_and_come_back, draw
from tests.training.runs import train_run


@pytest.fixture(scope="module")
def wholes(corpus: Path) -> dict[str, dict]:
    """Runs that nothing happened to."""
    made = {}
    for name, (ranks, parallel) in LAYOUTS.items():
        made[name] = tree_of(corpus, corpus / f"whole {name}", **SECTIONS, parallel=parallel)
        assert run_ranks(ranks, train_run, made[name]) == [0] * ranks
    return made


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_lost(corpus: Path, wholes: dict[str, dict], tmp_path: Path, place: str) -> None:
    chance = random.Random(place)
    names = sorted(LAYOUTS)
    name = names[PLACES.index(place) % len(names)]
    tree = tree_of(corpus, tmp_path / "run", **SECTIONS)
    deaths = [Death("SIGKILL", place, "before", 1, 0), draw(chance, LAYOUTS[name][0])]
    ends = die_and_come_back(tree, [name] * 3, deaths)
    assert ends[0] == "killed"
    assert compare(tree, wholes[name]) is None, deaths


def test_nothing_is_lost_between_layouts(corpus: Path, wholes: dict[str, dict], tmp_path: Path) -> None:
    tree = tree_of(corpus, tmp_path / "run", **SECTIONS)
    deaths = [Death("SIGKILL", "mid-step", "after", 5, 1), Death("exception", "evaluation", "after", 1, 0)]
    ends = die_and_come_back(tree, ["data 2, ZeRO 3", "tensor 2 x pipeline 2", "one rank, ZeRO 0"], deaths)
    assert ends == ["killed", "raised"]
    assert compare(tree, wholes["one rank, ZeRO 0"], moved=True) is None


def test_a_loss_is_seen(corpus: Path, wholes: dict[str, dict], tmp_path: Path) -> None:
    """Negative control: a sample too many, and a checkpoint that is gone, are both noticed."""
    name = "one rank, ZeRO 0"
    tree = tree_of(corpus, tmp_path / "run", **SECTIONS, parallel=LAYOUTS[name][1])
    assert run_ranks(1, train_run, tree, skip_a_sample) == [0]
    assert compare(tree, wholes[name]) == "another curve"
    assert compare(tree, wholes[name], moved=True) == "another samples"
    lost = tree_of(corpus, tmp_path / "lost", **SECTIONS, parallel=LAYOUTS[name][1])
    with pytest.raises(AssertionError, match="step-2 was lost"):
        die_and_come_back(lost, [name] * 3, [Death("SIGKILL", "between steps", "before", 3, 0), forget])  # type: ignore[list-item]
    assert checkpoints.newest(tmp_path / "lost" / "checkpoints") is None


def skip_a_sample(run) -> None:  # type: ignore[no-untyped-def]
    next(run.loader)


def forget(run) -> None:  # type: ignore[no-untyped-def]
    """A run that deletes what it has and dies."""
    import shutil

    shutil.rmtree(run.directory / "checkpoints")
    raise RuntimeError("planted death")
