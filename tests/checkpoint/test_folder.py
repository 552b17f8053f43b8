"""Checkpoints are whole or absent: a save is stopped at every operation on the disk, and nothing is lost."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.folder import Alone
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced, and when, has its own test."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


EMPTY = Manifest(
    step=0,
    tokens=0,
    config={},
    layout={},
    data={},
    trainer={},
    optimizer={},
    parameters={},
    files={},
    versions={"megalm": "0"},
)


def write_files(folder: Path, contents: dict[str, str]) -> checkpoints.Description:
    """Files, synced, and their description, as a rank's shards are."""
    described = {}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        described[name] = {"bytes": path.stat().st_size, "blake2b": manifests.checksum(path)}
    return described, {}


def shards(content: str) -> Callable[[Path], checkpoints.Description]:
    """Files like a run's: one at the top, two in a folder."""
    inner = {f"inner/rank-{rank}": f"{content} of rank {rank}" for rank in range(2)}
    return lambda folder: write_files(folder, {"weights": content, **inner})


def save(directory: Path, step: int, keep_last: int = 0, content: str = "") -> Path:
    manifest = replace(EMPTY, step=step)
    return checkpoints.save(directory, manifest, shards(content or f"step {step}"), Alone(), keep_last=keep_last)


def content(folder: Path) -> str:
    """What was saved there, verified."""
    checkpoints.verify(folder, Alone())
    return (folder / "weights").read_text()


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(".*"))


def test_save_writes_a_whole_checkpoint_and_latest(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    folder = save(directory, 20)
    assert folder == directory / "step-20"
    assert (directory / "latest").read_text() == "step-20\n"
    assert manifests.read(folder).files.keys() == {"weights", "inner/rank-0", "inner/rank-1"}
    assert content(folder) == "step 20"
    assert not leftovers(directory)


def test_newest_is_by_number_and_looks_at_whole_ones_only(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    for step in (9, 10, 100):
        save(tmp_path, step)
    for name in ("step-200", "step-x", ".step-300.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-x" / manifests.NAME).touch()
    assert checkpoints.steps(tmp_path) == [9, 10, 100]
    assert checkpoints.newest(tmp_path) == tmp_path / "step-100"
    # `latest` may be stale, empty or gone: a checkpoint that stands is still found
    for pointer in ("step-200\n", "", "\0"):
        (tmp_path / "latest").write_text(pointer)
        assert checkpoints.newest(tmp_path) == tmp_path / "step-100"
    (tmp_path / "latest").unlink()
    assert checkpoints.newest(tmp_path) == tmp_path / "step-100"


def test_keep_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 4, keep_last=2)
    assert checkpoints.steps(tmp_path) == [3, 4]
    save(tmp_path, 5, keep_last=0)
    assert checkpoints.steps(tmp_path) == [3, 4, 5]
    save(tmp_path, 6, keep_last=1)
    assert checkpoints.steps(tmp_path) == [6]
    assert not leftovers(tmp_path)


def test_keep_every(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        manifest = replace(EMPTY, step=step)
        checkpoints.save(tmp_path, manifest, shards(""), Alone(), keep_last=1, keep_every=20)
    assert checkpoints.steps(tmp_path) == [20, 40, 50]


def test_the_best_is_kept_under_its_name(tmp_path: Path) -> None:
    def save_best(step: int, best: int | None) -> None:
        checkpoints.save(tmp_path, replace(EMPTY, step=step), shards(f"{step}"), Alone(), keep_last=1, best=best)

    save_best(1, None)
    assert checkpoints.best(tmp_path) is None
    save_best(2, 2)
    save_best(3, 2)
    assert checkpoints.steps(tmp_path) == [2, 3] and content(checkpoints.resolve(tmp_path / "best")) == "2"
    save_best(4, 9)
    assert checkpoints.best(tmp_path) == tmp_path / "step-2", "one that could not be written is not named"
    save_best(5, 5)
    assert checkpoints.steps(tmp_path) == [5], "the former best has to go"
    shutil.rmtree(tmp_path / "step-5")
    assert checkpoints.best(tmp_path) is None
    with pytest.raises(MegalmError, match="best holds no whole checkpoint"):
        checkpoints.resolve(tmp_path / "best")
    checkpoints.set_best(tmp_path, None)
    assert not (tmp_path / "best").exists() and not leftovers(tmp_path)


def test_a_run_that_goes_back_keeps_what_it_then_writes(tmp_path: Path) -> None:
    """After resuming from step 10, steps 20 and 30 belong to a course that the run left."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep_last=1)
    assert checkpoints.newest(tmp_path) == tmp_path / "step-15"
    assert checkpoints.steps(tmp_path) == [15, 20, 30]
    save(tmp_path, 20, keep_last=1, content="anew")
    assert checkpoints.newest(tmp_path) == tmp_path / "step-20"
    assert content(tmp_path / "step-20") == "anew"
    assert checkpoints.steps(tmp_path) == [20, 30]


def test_going_back_leaves_the_later_course_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-40").mkdir()  # damaged beyond its name
    assert checkpoints.go_back(tmp_path, tmp_path / "step-30") == tmp_path / "step-30"
    assert checkpoints.steps(tmp_path) == [10, 20, 30], "the newest needs no going back"
    assert checkpoints.go_back(tmp_path, tmp_path / "step-10") == tmp_path / "step-10"
    assert checkpoints.steps(tmp_path) == [10] and checkpoints.newest(tmp_path) == tmp_path / "step-10"
    assert content(tmp_path / "left-step-30") == "step 30"
    # Given again before the first save, and after it, the same command goes on where the run is.
    assert checkpoints.go_back(tmp_path, tmp_path / "step-10") == tmp_path / "step-10"
    save(tmp_path, 15)
    assert checkpoints.go_back(tmp_path, tmp_path / "step-10") == tmp_path / "step-15"


def test_a_newest_checkpoint_that_lost_its_manifest_is_refused(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    checkpoints.refuse_headless(tmp_path)
    (tmp_path / "step-20" / manifests.NAME).unlink()
    with pytest.raises(MegalmError, match=f"step-20 is damaged: manifest.json is missing; use {tmp_path}/step-10"):
        checkpoints.refuse_headless(tmp_path)
    (tmp_path / "latest").write_text("nonsense\n")
    checkpoints.refuse_headless(tmp_path)


def test_a_damaged_manifest_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    path = tmp_path / "step-20" / manifests.NAME
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))
    message = f"step-20 is damaged: manifest.json was altered .*; use {tmp_path}/step-10 instead"
    with pytest.raises(MegalmError, match=message):
        checkpoints.read(tmp_path / "step-20")
    with pytest.raises(MegalmError, match=message):
        checkpoints.verify(tmp_path / "step-20", Alone())


def test_what_cannot_be_deleted_is_no_failure_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old checkpoint that a reader holds open on a network disk stays for a while; the new one stands."""
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or _fail())
        save(tmp_path, 20, keep_last=1)
        assert checkpoints.steps(tmp_path) == [20] and leftovers(tmp_path) == [".step-10.old"]
        save(tmp_path, 30, keep_last=1)
        patch.setattr(os, "rename", _fail)
        with pytest.raises(checkpoints.NotWritten):
            save(tmp_path, 40, keep_last=1)
    save(tmp_path, 50, keep_last=1)
    assert checkpoints.steps(tmp_path) == [50] and not leftovers(tmp_path)


class Crash(BaseException):
    """The process ends here."""


OPERATIONS = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync")


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Crash instead of the operation of this number on the disk."""
    seen = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > number:
                raise Crash
            return operation(*arguments, **options)

        return run

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def crash_everywhere(
    directory: Path, before: list[int], step: int, keep_last: int, save: Callable[..., Any] = save
) -> int:
    """Save `step` once for every operation it makes, crashing there; what must hold then, and after the next save.

    Returns the number of operations.
    """
    template = directory.with_name("template")
    for earlier in before:
        save(template, earlier, content=f"old {earlier}")
    kept = {*(before[-keep_last + 1 :] if keep_last else before)}
    number = 0
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        if before:
            shutil.copytree(template, directory)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, number)
            try:
                save(directory, step, keep_last=keep_last, content="new")
                return number
            except Crash:
                pass
        found = checkpoints.steps(directory)
        for one in found:
            assert content(directory / f"step-{one}") in (f"old {one}", "new" if one == step else None)
        # The one that is being replaced is out of sight for an instant, between two renames, until the next save.
        hidden = {step} - {*found} if step in before else set()
        assert kept - hidden <= {*found}
        newest = checkpoints.newest(directory)
        assert (newest is None) == (not found)
        if newest and not hidden:
            assert newest.name in {f"step-{one}" for one in (*before[-1:], step)}
            assert checkpoints.resolve(directory) == newest

        after = max([step, *before]) + 10
        save(directory, after, content="next")
        assert checkpoints.newest(directory) == directory / f"step-{after}"
        assert {*kept, *found, after} <= {*checkpoints.steps(directory)}
        for one in {*checkpoints.steps(directory)} - {after}:
            assert content(directory / f"step-{one}") in (f"old {one}", "new" if one == step else None)
        assert not leftovers(directory)
        number += 1


@pytest.mark.parametrize(
    ("before", "step", "keep_last"),
    [([], 10, 0), ([10, 20], 30, 0), ([10, 20, 30], 40, 2), ([10, 20], 20, 0), ([10, 20, 30], 20, 0)],
    ids=["first", "next", "retention", "same step again", "earlier step again"],
)
def test_a_crash_anywhere_loses_nothing(tmp_path: Path, before: list[int], step: int, keep_last: int) -> None:
    operations = crash_everywhere(tmp_path / "checkpoints", before, step, keep_last)
    assert operations >= 10


def test_saving_in_place_fails_the_same_check(tmp_path: Path) -> None:
    """Negative control: files written under their final names, the manifest first."""

    def naive(directory: Path, step: int, keep_last: int = 0, content: str = "") -> None:
        folder = directory / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        manifests.write(folder, replace(EMPTY, step=step, files={"weights": {"bytes": 3, "blake2b": ""}}))
        shards(content)(folder)
        (directory / "latest").write_text(f"step-{step}\n")

    with pytest.raises(MegalmError, match="damaged"):
        crash_everywhere(tmp_path / "checkpoints", [10], 20, 0, naive)


def test_a_crash_while_shards_are_written(tmp_path: Path) -> None:
    save(tmp_path, 10)

    def crash(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise Crash

    with pytest.raises(Crash):
        checkpoints.save(tmp_path, replace(EMPTY, step=20), crash, Alone())
    assert leftovers(tmp_path) == [".step-20.partial"]
    assert checkpoints.newest(tmp_path) == tmp_path / "step-10"
    save(tmp_path, 30)  # another step: what the crash left goes all the same
    assert checkpoints.steps(tmp_path) == [10, 30] and not leftovers(tmp_path)


def test_everything_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's content and its entry in its folder are synced before the rename, the rename before save() returns."""
    synced: set[int] = set()
    unsynced: dict[str, list[str]] = {}

    def rename(operation: Callable[..., None]) -> Callable[..., None]:
        def run(source: Path, target: Path) -> None:
            inside = [source, *Path(source).rglob("*")]
            unsynced[Path(source).name] = [path.name for path in inside if path.stat().st_ino not in synced]
            synced.discard(Path(source).parent.stat().st_ino)
            operation(source, target)

        return run

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", rename(os.rename))
    monkeypatch.setattr(os, "replace", rename(os.replace))
    save(tmp_path, 10)
    assert unsynced == {".step-10.partial": [], ".latest.new": []}
    assert tmp_path.stat().st_ino in synced


def test_going_back_is_on_disk_before_the_note_that_it_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, a power cut could leave the note alone, and the run would go on from where it was."""
    for step in (10, 20):
        save(tmp_path, step)
    done: list[str] = []

    def moved(operation: Callable[..., None]) -> Callable[..., None]:
        def run(source: Path, target: Path) -> None:
            done.append(Path(target).name)
            operation(source, target)

        return run

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            done.append("synced")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved(os.rename))
    monkeypatch.setattr(os, "replace", moved(os.replace))
    checkpoints.go_back(tmp_path, tmp_path / "step-10")
    assert done == ["left-step-20", "latest", "synced", "went-back", "synced"]


class Threads:
    """A group of ranks, each a thread."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, items: list[Any]) -> None:
        self.rank, self.size, self._meeting, self._items = rank, size, meeting, items

    def barrier(self) -> None:
        self._meeting.wait(10)

    def gather(self, item: Any) -> list[Any]:
        self._items[self.rank] = item
        self.barrier()
        gathered = list(self._items)
        self.barrier()
        return gathered


def on_ranks(size: int, work: Callable[[Threads], None]) -> list[Exception | None]:
    """Run `work` on every rank of a group; what each raised."""
    meeting, items = threading.Barrier(size), [None] * size
    raised: list[Exception | None] = [None] * size

    def run(rank: int) -> None:
        try:
            work(Threads(rank, size, meeting, items))
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_ranks_write_and_verify_one_checkpoint_together(tmp_path: Path) -> None:
    def write(ranks: Threads) -> None:
        def shard(folder: Path) -> checkpoints.Description:
            return write_files(folder, {f"rank-{ranks.rank}": f"rank {ranks.rank}"})

        checkpoints.save(tmp_path, replace(EMPTY, step=1), shard, ranks)

    assert on_ranks(3, write) == [None] * 3
    folder = tmp_path / "step-1"
    assert manifests.read(folder).files.keys() == {"rank-0", "rank-1", "rank-2"}
    assert on_ranks(3, lambda ranks: checkpoints.verify(folder, ranks) and None) == [None] * 3
    # a fault that one rank finds is an error on all
    (folder / "rank-1").write_text("rank !")
    for error in on_ranks(3, lambda ranks: checkpoints.verify(folder, ranks) and None):
        assert isinstance(error, MegalmError) and "rank-1 was altered" in str(error)


def _fail(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _at(monkeypatch: pytest.MonkeyPatch, name: str, rank: int) -> None:
    """Make a function of folder.py fail on one rank."""
    where, _, attribute = name.rpartition(".")
    module = getattr(checkpoints, where) if where else checkpoints
    right = getattr(module, attribute)
    monkeypatch.setattr(
        module,
        attribute,
        lambda *arguments, **options: (
            _fail() if threading.current_thread().name == f"rank {rank}" else right(*arguments, **options)
        ),
    )


@pytest.mark.parametrize(
    ("function", "rank"),
    [("Path.mkdir", 0), ("not shared", 2), ("sync", 0), ("manifests.write", 0), ("_put_in_place", 0), ("shard", 2)],
)
def test_a_disk_that_fails_on_one_rank_is_an_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, rank: int
) -> None:
    save(tmp_path, 10)

    def write(ranks: Threads) -> None:
        def shard(folder: Path) -> checkpoints.Description:
            if function == "shard" and ranks.rank == rank:
                _fail()
            return write_files(folder, {f"rank-{ranks.rank}": "x"})

        checkpoints.save(tmp_path, replace(EMPTY, step=20), shard, ranks)

    with monkeypatch.context() as patch:
        if function == "not shared":  # the folder that rank 0 makes is not there for the others
            patch.setattr(checkpoints.Path, "mkdir", lambda *arguments, **options: None)
        elif function != "shard":
            _at(patch, function, rank)
        raised = on_ranks(3, write)
    for error in raised:
        assert isinstance(error, MegalmError) and "\n" not in str(error)
        assert f"the checkpoint {tmp_path}/step-20 could not be written (rank " in str(error)
        assert "GB are free): make room, or choose another run.directory, and start again" in str(error)
    assert checkpoints.steps(tmp_path) == [10] and not leftovers(tmp_path), "what was written goes, to leave room"
    assert content(tmp_path / "step-10") == "step 10"
    assert on_ranks(3, write) == [None] * 3 if function != "shard" else save(tmp_path, 20)
    assert checkpoints.steps(tmp_path) == [10, 20]


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / ".step-15.partial").mkdir()  # of a crash, to be cleared away before room is measured
    begun = []
    with pytest.raises(
        MegalmError, match=r"step-20 could not be written \(rank 0: it takes about 1000000000.0 GB; .* GB"
    ):
        checkpoints.save(tmp_path, replace(EMPTY, step=20), begun.append, Alone(), needed=10**18)
    assert not begun and not leftovers(tmp_path) and checkpoints.steps(tmp_path) == [10]


def test_what_is_no_fault_of_a_disk_stays_what_it_is(tmp_path: Path) -> None:
    def wrong(folder: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        checkpoints.save(tmp_path, replace(EMPTY, step=20), wrong, Alone())


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "is missing"),
    "short": (lambda path: os.truncate(path, 3), "holds 3 bytes instead of 17"),
    "altered": (alter, r"was altered \(its checksum differs\)"),
    "unreadable": (lambda path: (path.unlink(), path.symlink_to(path.name)), "cannot be read|is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_file_and_the_newest_other_checkpoint(tmp_path: Path, fault: str) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    damage, words = FAULTS[fault]
    damage(tmp_path / "step-30" / "inner" / "rank-1")
    message = f"step-30 is damaged: inner/rank-1 ({words}); use {tmp_path}/step-20 instead"
    with pytest.raises(MegalmError, match=message):
        checkpoints.verify(tmp_path / "step-30", Alone())
    # one that is damaged itself is not offered, whether a file or its manifest is
    (tmp_path / "step-20" / "weights").unlink()
    with pytest.raises(MegalmError, match=f"use {tmp_path}/step-10 instead"):
        checkpoints.verify(tmp_path / "step-30", Alone())
    (tmp_path / "step-10" / manifests.NAME).write_text("{")
    (tmp_path / "step-30" / "weights").unlink()
    with pytest.raises(MegalmError, match=r"\(and 1 more fault\); no whole checkpoint stands beside it"):
        checkpoints.verify(tmp_path / "step-30", Alone())


def test_sizes_alone_do_not_read_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    alter(folder / "weights")
    assert checkpoints.verify(folder, Alone(), checksums=False) == manifests.read(folder)
    (folder / "weights").unlink()
    with pytest.raises(MegalmError, match="weights is missing"):
        checkpoints.verify(folder, Alone(), checksums=False)


def test_resolve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "checkpoints", 10)
    folder = save(run / "checkpoints", 20)
    assert checkpoints.resolve(run) == checkpoints.resolve(run / "checkpoints") == checkpoints.resolve(folder) == folder
    with pytest.raises(MegalmError, match="nowhere does not exist: name a run folder or RUN/checkpoints/step-N"):
        checkpoints.resolve(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for path in ("empty", "file"):
        with pytest.raises(MegalmError, match=f"{path} holds no whole checkpoint: name a run folder or"):
            checkpoints.resolve(tmp_path / path)
