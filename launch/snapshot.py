"""What a start of a run was made of, kept in the run's folder: enough to say later why two starts differ."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from launch.target import REPOSITORY, Target
from megalm.config import dump

_SECRET = re.compile(r"key|token|secret|passw|credential|cookie|auth", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")
_LARGEST_DIFF = 5_000_000


def take(target: Target, folder: Path, nodes: list[str], script: str | None) -> None:
    """Write config, code version and diff, environment, package versions, node list and batch script into `folder`.

    Values of variables whose names speak of keys, tokens or passwords are left out. script: the text of the batch
    script, if a scheduler runs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if target.config is not None:
        (folder / "config.yaml").write_text(dump(target.config), encoding="utf-8")
    (folder / "command.txt").write_text("\n".join(target.command) + "\n", encoding="utf-8")
    version, diff = _code()
    (folder / "code.txt").write_text(version, encoding="utf-8")
    if diff:
        (folder / "code.diff").write_bytes(diff[:_LARGEST_DIFF])
    (folder / "environment.txt").write_text(environment(dict(os.environ)), encoding="utf-8")
    (folder / "packages.txt").write_text(packages(), encoding="utf-8")
    (folder / "nodes.txt").write_text("\n".join(nodes) + "\n", encoding="utf-8")
    if script is not None:
        (folder / "script.sh").write_text(script, encoding="utf-8")


def _code() -> tuple[str, bytes]:
    """The commit and the state of the working tree, and the difference between them."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, timeout=30).stdout

    try:
        commit = git("log", "-1", "--format=%H %cI %s").decode(errors="replace").strip()
        status = git("status", "--short").decode(errors="replace")
        return f"{commit or 'no commit: not a git checkout'}\n{status}", git("diff", "HEAD")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}\n", b""


def environment(variables: dict[str, str]) -> str:
    """One NAME=value per line, without secrets."""
    lines = []
    for name, value in sorted(variables.items()):
        shown = "(left out)" if _SECRET.search(name) else _URL_PASSWORD.sub(r"\1(left out)@", value)
        lines.append(f"{name}={shown!r}" if "\n" in shown else f"{name}={shown}")
    return "\n".join(lines) + "\n"


def packages() -> str:
    """Python and every installed distribution, as pip freeze would name them."""
    found = {f"{each.metadata['Name']}=={each.version}" for each in distributions() if each.metadata["Name"]}
    return (
        "\n".join([f"# Python {sys.version.split()[0]}, {platform.platform()}", *sorted(found, key=str.lower)]) + "\n"
    )
