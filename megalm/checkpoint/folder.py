"""RUN/checkpoints: step-N folders that are whole or absent, and `latest`, which names the newest."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError

LATEST = "latest"


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
    found = []
    for folder in directory.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / manifests.NAME).exists():
            found.append(int(match.group(1)))
    return sorted(found)


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint of RUN/checkpoints."""
    found = steps(directory)
    return directory / f"step-{found[-1]}" if found else None


def resolve(path: Path) -> Path:
    """A checkpoint folder from itself, a run folder (its newest) or a RUN/checkpoints folder.

    Raises MegalmError if there is none.
    """
    if not path.exists():
        raise MegalmError(f"{path} does not exist: name a run folder or RUN/checkpoints/step-N")
    if (path / manifests.NAME).exists():
        return path
    for directory in (path / "checkpoints", path):
        if folder := newest(directory):
            return folder
    raise MegalmError(f"{path} holds no whole checkpoint: name a run folder or RUN/checkpoints/step-N")


def save(
    directory: Path,
    manifest: Manifest,
    write_shards: Callable[[Path], None],
    ranks: Ranks,
    *,
    keep_last: int = 0,
) -> Path:
    """Write RUN/checkpoints/step-N: shards into a temporary folder, manifest last, synced, then renamed.

    write_shards writes this rank's files into the folder it is given. Every rank calls save. A crash at any moment
    leaves the checkpoints before it as they were.
    """
    name = f"step-{manifest.step}"
    partial, final = directory / f".{name}.partial", directory / name
    if ranks.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    write_shards(partial)
    ranks.barrier()
    # Ranks share the reading back: files are many and large.
    files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    mine = {}
    for file in files[ranks.rank :: ranks.size]:
        _sync(partial / file)
        mine[file] = manifests.describe_file(partial / file)
    described: dict[str, Any] = {}
    for part in ranks.gather(mine):
        described |= part
    if ranks.rank == 0:
        manifests.write(partial, replace(manifest, files=described))
        _sync(partial)
        if final.exists():
            # Only a rollback writes a step twice; the old folder steps aside until the new one stands.
            old = directory / f".{name}.old"
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
        pointer = directory / f".{LATEST}"
        pointer.write_text(name + "\n")
        pointer.replace(directory / LATEST)
        _sync(directory)
        if keep_last:
            for step in steps(directory)[:-keep_last]:
                _remove(directory / f"step-{step}")
    ranks.barrier()
    return final


def verify(folder: Path, ranks: Ranks, *, checksums: bool = True) -> Manifest:
    """The manifest of a checkpoint whose files are all there and unaltered. Every rank calls it.

    Raises MegalmError naming the first faulty file and the newest whole checkpoint beside it.
    """
    manifest = manifests.read(folder)
    files = sorted(manifest.files)
    mine = manifests.faults(folder, manifest, files[ranks.rank :: ranks.size], checksums=checksums)
    found = sorted(fault for part in ranks.gather(mine) for fault in part)
    if found:
        more = f" (and {len(found) - 1} more faults)" if len(found) > 1 else ""
        others = [step for step in steps(folder.parent) if folder.name != f"step-{step}"]
        way = (
            f"resume from {folder.parent / f'step-{others[-1]}'}" if others else "no other checkpoint stands beside it"
        )
        raise MegalmError(f"checkpoint {folder} is damaged: {found[0]}{more}; {way}")
    return manifest


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves nothing that looks whole."""
    aside = folder.with_name(f".{folder.name}.old")
    folder.rename(aside)
    shutil.rmtree(aside)
