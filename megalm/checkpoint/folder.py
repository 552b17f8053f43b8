"""RUN/checkpoints: step-N folders that are whole or absent; `latest`, which names the newest; and `best`."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint import tensors
from megalm.checkpoint.manifest import Manifest
from megalm.disk import sync
from megalm.errors import MegalmError

LATEST = "latest"
BEST = "best"
"""Names the checkpoint whose evaluation was the best, where evaluate.keep_best says so."""
WENT_BACK = "went-back"
"""Names the checkpoint that the run was last told to go back to, as it was told: step-N or best."""


class Ranks(Protocol):
    """The ranks that write one checkpoint together (parallel.groups.Groups; `Alone` for one process)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def barrier(self) -> None: ...

    def gather(self, item: Any) -> list[Any]: ...


class Alone:
    """A group of one, for tools."""

    rank, size = 0, 1

    def barrier(self) -> None:
        pass

    def gather(self, item: Any) -> list[Any]:
        return [item]


def steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints in RUN/checkpoints, ascending."""
    whole = (folder for folder in directory.glob("step-*") if (folder / manifests.NAME).exists())
    return sorted(number for folder in whole if (number := _number(folder)) >= 0)


def newest(directory: Path) -> Path | None:
    """The whole checkpoint of RUN/checkpoints that was written last, or None.

    `latest` names it; a run that went back to an earlier step may have left higher ones of its abandoned course.
    """
    found = [f"step-{step}" for step in steps(directory)]
    pointer = directory / LATEST
    named = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
    if named in found:
        return directory / named
    return directory / found[-1] if found else None


def best(directory: Path) -> Path | None:
    """The whole checkpoint of RUN/checkpoints that `best` names, or None."""
    return _named(directory / BEST)


def set_best(directory: Path, step: int | None) -> None:
    """Let `best` name the checkpoint of a step, unless there is none that is whole; None: let it name nothing."""
    if step is None:
        (directory / BEST).unlink(missing_ok=True)
    elif best(directory) != (folder := directory / f"step-{step}") and (folder / manifests.NAME).exists():
        _note(directory / BEST, folder.name)
        sync(directory)


def _named(pointer: Path) -> Path | None:
    """The whole checkpoint that a file beside it names, or None."""
    if not pointer.is_file():
        return None
    folder = pointer.with_name(pointer.read_text(errors="replace").strip() or "step-")
    return folder if _number(folder) >= 0 and (folder / manifests.NAME).exists() else None


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises MegalmError if it is damaged, naming the newest whole one beside it."""
    try:
        return manifests.read(folder)
    except manifests.Unreadable as error:
        refuse_damaged(folder, [error.fault])
        raise


def refuse_headless(directory: Path) -> None:
    """Raises MegalmError if the checkpoint that `latest` names is there without its manifest: it was damaged since."""
    pointer = directory / LATEST
    named = directory / pointer.read_text(errors="replace").strip() if pointer.exists() else directory
    if _number(named) >= 0 and named.is_dir() and not (named / manifests.NAME).exists():
        refuse_damaged(named, [f"{manifests.NAME} is missing"])


def resolve(path: Path) -> Path:
    """A checkpoint folder from itself, a run folder (its newest), RUN/checkpoints, or `latest` or `best` in it.

    Raises MegalmError if there is none.
    """
    if not path.exists():
        raise MegalmError(f"{path} does not exist: name a run folder or RUN/checkpoints/step-N")
    if (path / manifests.NAME).exists():
        return path
    if path.name in (LATEST, BEST) and (named := _named(path)):
        return named
    for directory in (path / "checkpoints", path):
        if folder := newest(directory):
            return folder
    raise MegalmError(f"{path} holds no whole checkpoint: name a run folder or RUN/checkpoints/step-N")


Description = tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]
"""A rank's part of a manifest: its files, and its stretches of parameters."""


class NotWritten(MegalmError):
    """A checkpoint could not be written; those before it are as they were. what: the sentence without the way out."""

    def __init__(self, what: str, *, echo: bool):
        self.what = what
        super().__init__(
            f"{what}: make room, or choose another run.directory, and start again; the run continues from its newest "
            "checkpoint",
            echo=echo,
        )


def save(
    directory: Path,
    manifest: Manifest,
    write_shards: Callable[[Path], Description],
    ranks: Ranks,
    *,
    keep_last: int = 0,
    keep_every: int = 0,
    best: int | None = None,
    needed: int = 0,
) -> Path:
    """Write RUN/checkpoints/step-N: shards into a temporary folder, manifest last, synced, then renamed.

    write_shards writes this rank's files, synced, into the folder it is given, and describes them; the manifest's
    `files` and `parameters` are made of that. needed: bytes that all files will take, about. keep_last, keep_every: see
    CheckpointConfig. best: step of the best checkpoint so far, this one or an earlier one, which is kept. Every rank
    calls save. A crash at any moment leaves the checkpoints before it as they were.

    Raises NotWritten on every rank when a disk is full, read-only or fails on one.
    """
    name = f"step-{manifest.step}"
    partial, final = directory / f".{name}.partial", directory / name
    with together(ranks, partial):
        if ranks.rank == 0:
            recover(directory)
            partial.mkdir(parents=True, exist_ok=True)
    with together(ranks, partial):
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(f"it takes about {needed / 1e9:.1f} GB")
    mine: Description = {}, {}
    with together(ranks, partial):
        mine = write_shards(partial)
    everyone = ranks.gather(mine)
    with together(ranks, partial):
        if ranks.rank == 0:
            files = {file: entry for described, _ in everyone for file, entry in described.items()}
            for file, entry in files.items():
                if not (partial / file).exists() or (partial / file).stat().st_size != entry["bytes"]:
                    raise OSError(
                        f"{file} of another rank is not seen here, run.directory must be shared by all machines"
                    )
            parameters = tensors.merge(table for _, table in everyone)
            manifests.write(partial, replace(manifest, files=files, parameters=parameters))
            _put_in_place(partial, final)
            if best is not None:
                set_best(directory, best)
    if ranks.rank == 0 and keep_last:
        with suppress(OSError):  # the new one stands: an old one that a reader keeps from going is no fault of it
            _retain(directory, manifest.step, keep_last, keep_every)
    return final


@contextmanager
def together(ranks: Ranks, partial: Path) -> Iterator[None]:
    """A part of writing a checkpoint that ends on all ranks when it has ended on each.

    Raises NotWritten on all of them if files cannot be written on one; the unfinished checkpoint is cleared away.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    mine = "" if failure is None else f"rank {ranks.rank}: {getattr(failure, 'strerror', None) or failure}"
    failures = [found for found in ranks.gather(mine) if found]
    if not failures:
        return
    directory = partial.parent
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    name = partial.stem.removeprefix(".")
    raise NotWritten(
        f"the checkpoint {directory / name} could not be written ({failures[0]}{_free(directory)})",
        echo=ranks.rank > 0,
    ) from failure


def _free(directory: Path) -> str:
    try:
        here = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
        return f"; {shutil.disk_usage(here).free / 1e9:.1f} GB are free"
    except OSError:  # of a disk that fails in every way
        return ""


def _put_in_place(partial: Path, final: Path) -> None:
    """Make a folder that is complete the newest checkpoint."""
    directory = final.parent
    for inner in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync(inner)
    if final.exists():
        # Only a run that went back writes a step twice; the old folder steps aside until the new one stands.
        aside = _set_aside(final)
        partial.rename(final)
        _delete(aside)
    else:
        partial.rename(final)
    _note(directory / LATEST, final.name)
    sync(directory)


def _note(path: Path, name: str) -> None:
    """Write a checkpoint's name into a file that always holds one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(name + "\n")
    sync(new)
    new.replace(path)


def _retain(directory: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints up to `step` but the last ones, those at multiples, and the best."""
    # Steps ahead of this one are of a course that the run left: never a reason to remove this one.
    behind = [other for other in steps(directory) if other <= step]
    kept = best(directory)
    for other in behind[:-keep_last]:
        if (not keep_every or other % keep_every) and directory / f"step-{other}" != kept:
            _delete(_set_aside(directory / f"step-{other}"))


def go_back(directory: Path, folder: Path) -> Path:
    """The checkpoint to continue from when a run is told to continue from `folder`, one of its own, or its `best`.

    Later ones belong to a course that the run then leaves, and step aside as left-step-N. The same command given again
    finds that it did so, and continues from the newest, even if `folder` was deleted since.

    Raises MegalmError if it is no checkpoint of the run.
    """
    newest_one, told = newest(directory), folder
    if newest_one and told == directory / _went_back(directory):
        return newest_one
    folder = resolve(told)
    number = _number(folder)
    if folder.parent != directory or number < 0:
        raise MegalmError(
            f"a run does not go back to {told}, which is not named step-N: choose a step-N of {directory}, or rename "
            "it back to step-N first"
        )
    later = [path for path in directory.glob("step-*") if _number(path) > number]
    for path in sorted(later, key=_number, reverse=True):
        left = directory / f"left-{path.name}"
        shutil.rmtree(left, ignore_errors=True)
        path.rename(left)
    _note(directory / LATEST, folder.name)
    sync(directory)  # a power cut must not leave the note that it is done without what was done
    _note(directory / WENT_BACK, told.name)
    sync(directory)
    return folder


def _went_back(directory: Path) -> str:
    note = directory / WENT_BACK
    return note.read_text(errors="replace").strip() if note.is_file() else ""


def _number(folder: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def verify(folder: Path, ranks: Ranks, *, checksums: bool = True) -> Manifest:
    """The manifest of a checkpoint whose files are all there and unaltered. Every rank calls it.

    Raises MegalmError naming the first faulty file and the newest whole checkpoint beside it.
    """
    manifest = read(folder)
    files = sorted(manifest.files)
    mine = manifests.faults(folder, manifest, files[ranks.rank :: ranks.size], checksums=checksums)
    refuse_damaged(folder, sorted(fault for part in ranks.gather(mine) for fault in part), echo=ranks.rank > 0)
    return manifest


def refuse_damaged(folder: Path, faults: list[str], *, echo: bool = False) -> None:
    """Raises MegalmError naming the first of a checkpoint's faults, if any, and the newest whole one beside it."""
    if not faults:
        return
    more = len(faults) - 1
    suffix = f" (and {more} more fault{'s' if more > 1 else ''})" if more else ""
    other = _other(folder)
    way = f"use {other} instead" if other else "no whole checkpoint stands beside it"
    if other and other.name == _went_back(folder.parent):  # told so again, the run would go on from the newest
        way += f", and move {folder.name} away first, as the run went back to {other.name} before"
    raise MegalmError(f"checkpoint {folder} is damaged: {faults[0]}{suffix}; {way}", echo=echo)


def _other(folder: Path) -> Path | None:
    """The newest other checkpoint beside this one whose files all have their sizes."""
    for step in reversed(steps(folder.parent)):
        other = folder.parent / f"step-{step}"
        if other.name == folder.name:
            continue
        try:
            manifest = manifests.read(other)
        except MegalmError:  # as damaged as the first
            continue
        if not manifests.faults(other, manifest, manifest.files, checksums=False):
            return other
    return None


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it no longer counts as one."""
    return folder.rename(folder.with_name(f".{folder.name}.old"))


def _delete(aside: Path) -> None:
    """Delete a checkpoint that was set aside; without a manifest from the first moment, so it never looks whole. What
    cannot go yet, because a reader holds it, goes another time."""
    (aside / manifests.NAME).unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)


def recover(directory: Path) -> None:
    """Clear away what crashes left: unfinished checkpoints; what was set aside, unless nothing took its place."""
    for partial in directory.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for new in directory.glob(".*.new"):
        new.unlink(missing_ok=True)
    for aside in directory.glob(".step-*.old"):
        place = directory / aside.name.removeprefix(".").removesuffix(".old")
        if (aside / manifests.NAME).exists() and not place.exists():
            aside.rename(place)
        else:
            _delete(aside)
