"""`--resume RUN/checkpoints/step-N` takes a run back once; given again, the same command goes on where the run is."""

import shutil
from pathlib import Path

import pytest

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.errors import MegalmError
from megalm.training import resume
from megalm.training.config import RunConfig
from tests.checkpoint.test_folder import save
from tests.training.conftest import tree_of


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """RUN/checkpoints with the steps 1, 2 and 3."""
    directory = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        save(directory, step)
    return directory


def find(own: Path, name: str) -> Path | None:
    """What a run finds that is started with --resume RUN/checkpoints/NAME."""
    tree = tree_of(own.parent.parent, own.parent, checkpoint={"resume": str(own / name)})
    return resume.find(RunConfig.model_validate(tree))


def test_what_follows_the_newest_whole_one_is_not_left_again(own: Path) -> None:
    """The advice for a damaged checkpoint names what is then the newest."""
    (own / "step-3" / manifests.NAME).unlink()
    assert find(own, "step-2") == own / "step-2"
    assert find(own, "step-2") == own / "step-2", "a run that died before its first save"
    for step in (3, 4):
        save(own, step)
    assert find(own, "step-2") == own / "step-4"
    assert checkpoints.steps(own) == [1, 2, 3, 4]
    assert find(own, "step-3") == own / "step-3", "another command is another wish"
    assert find(own, "step-2") == own / "step-2"


def test_retention_may_delete_what_the_run_went_back_to(own: Path) -> None:
    assert find(own, "step-2") == own / "step-2"
    for step in (3, 4):
        save(own, step, keep_last=1)
    assert checkpoints.steps(own) == [4]
    assert find(own, "step-2") == own / "step-4"
    with pytest.raises(MegalmError, match="step-3 does not exist"):
        find(own, "step-3")
    shutil.rmtree(own / "step-4")
    with pytest.raises(MegalmError, match="step-2 does not exist"):
        find(own, "step-2")


def test_the_best_is_gone_back_to_once(own: Path) -> None:
    checkpoints.set_best(own, 2)
    assert find(own, "best") == own / "step-2"
    for step in (3, 4):
        save(own, step)
    checkpoints.set_best(own, 3)
    assert find(own, "best") == own / "step-4", "a better one that came since is no reason to leave later ones"


def test_the_latest_is_no_going_back(own: Path) -> None:
    assert find(own, "latest") == own / "step-3"
    save(own, 4)
    assert find(own, "step-3") == own / "step-3"
    (own / "step-3" / manifests.NAME).unlink()
    with pytest.raises(MegalmError, match="step-3 is damaged"):
        find(own, "latest")


@pytest.mark.parametrize("name", ["left-step-3", "mine", "kept/step-3"])
def test_another_name_is_refused(own: Path, name: str) -> None:
    assert find(own, "step-2") == own / "step-2"
    (own / "kept").mkdir()
    (own / "left-step-3").rename(own / name)
    with pytest.raises(
        MegalmError, match=rf"does not go back to .*{name}, .*: choose a step-N of .* or rename it back"
    ):
        find(own, name)
    (own / name).rename(own / "step-3")
    assert find(own, "step-3") == own / "step-3"


def test_the_way_out_of_damage_after_going_back(own: Path) -> None:
    """The checkpoint that is offered may be the one that the note names."""
    find(own, "step-2")
    damaged = save(own, 3)
    with pytest.raises(MegalmError, match="use .*step-2 instead, and move step-3 away first"):
        checkpoints.refuse_damaged(damaged, ["weights is missing"])
    damaged.rename(own.parent / "damaged")
    assert find(own, "step-2") == own / "step-2"
