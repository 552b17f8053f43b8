"""What a checkpoint folder says about itself. Written last: a folder without a manifest is not a checkpoint."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megalm.errors import MegalmError

FORMAT = 2
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The state of a run at a step, beside the shards that hold its tensors.

    layout: degrees per axis. data: the loader's state. trainer: the loop's own state. optimizer: its count of
    updates, and fp16's loss scale. parameters: full name -> {shape, shard_dim, dtype, kinds, pieces} of every weight,
    whole; dtype is that of the forward pass; kinds are the tensors kept of it, each in these pieces, [rank that wrote
    it, slice along shard_dim, start in the flattened slice, count]. files: name -> {bytes, blake2b}.
    """

    step: int
    tokens: int
    config: dict[str, Any]
    layout: dict[str, int]
    data: dict[str, Any]
    trainer: dict[str, Any]
    optimizer: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]
    format: int = FORMAT


class Unreadable(MegalmError):
    """A manifest is damaged. fault: a phrase that starts with its name, as faults() has them."""

    def __init__(self, folder: Path, fault: str):
        self.fault = f"{NAME} {fault}"
        super().__init__(f"{folder / NAME} {fault}: choose another checkpoint of the run")


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises MegalmError if there is none or it is not ours, and Unreadable."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise MegalmError(
            f"{folder} is not a checkpoint: it has no {NAME}; name a folder RUN/checkpoints/step-N"
        ) from None
    except (OSError, ValueError) as error:
        raise Unreadable(folder, f"cannot be read ({error})") from None
    known = {field.name for field in fields(Manifest)} | {"blake2b"}
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != known:
        raise MegalmError(
            f"{path} is not a manifest of format {FORMAT}, it was written by another version of megalm or altered: use "
            "that version, or another checkpoint"
        )
    if content.pop("blake2b") != _digest(content):
        raise Unreadable(folder, "was altered (its checksum differs)")
    return Manifest(**content)


def write(folder: Path, manifest: Manifest) -> None:
    """A line per field, so that a person can read it, and last the checksum of all of them."""
    content = asdict(manifest)
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (*content.items(), ("blake2b", _digest(content)))
    ]
    with (folder / NAME).open("w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))  # keys as JSON has them
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def faults(folder: Path, manifest: Manifest, names: Iterable[str], *, checksums: bool = True) -> list[str]:
    """What is wrong with these files of a checkpoint, a phrase each, starting with the file's name."""
    found = []
    for name in names:
        path, expected = folder / name, manifest.files[name]
        try:
            if not path.exists():
                found.append(f"{name} is missing")
            elif path.stat().st_size != expected["bytes"]:
                found.append(f"{name} holds {path.stat().st_size} bytes instead of {expected['bytes']}")
            elif checksums and checksum(path) != expected["blake2b"]:
                found.append(f"{name} was altered (its checksum differs)")
        except OSError as error:  # one rank's bad disk is every rank's message, not a hang
            found.append(f"{name} cannot be read ({error.strerror})")
    return found
