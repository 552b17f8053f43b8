"""What is to be run, and what its folder says of how far it is. Reads files only: no torch."""

import sys
from dataclasses import dataclass
from pathlib import Path

from megalm.config import load
from megalm.errors import MegalmError
from megalm.training.config import RunConfig

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = "megalm/train.py"


@dataclass(frozen=True)
class Target:
    """A command that ranks run. arguments: a script and what follows it. folder: where the launcher keeps its files
    (the run folder of a training). config: of a training, None for other scripts."""

    arguments: list[str]
    folder: Path
    config: RunConfig | None = None

    @property
    def command(self) -> list[str]:
        """As a process starts it."""
        return [sys.executable, "-u", *self.arguments]

    @property
    def is_done(self) -> bool:
        """Whether the newest checkpoint is that of the last step. Scripts that are no training never are."""
        return self.config is not None and newest_step(self.folder) >= self.config.train.steps

    def problem(self, world_size: int) -> str | None:
        """Why it cannot run on so many ranks, or None."""
        if self.config is None:
            return None
        from megalm.training.plan import plan

        try:
            plan(self.config, world_size)
        except MegalmError as error:
            return str(error)
        return None


def newest_step(folder: Path) -> int:
    """The step of a run's newest checkpoint, as RUN/checkpoints/latest names it; 0 without one."""
    latest = folder / "checkpoints" / "latest"
    try:
        name = latest.read_text(errors="replace").strip()
    except OSError:
        return 0
    whole = (latest.parent / name / "manifest.json").exists()
    return int(name.removeprefix("step-")) if whole and name.removeprefix("step-").isdecimal() else 0


def training(config: str, overrides: list[str]) -> Target:
    """The training that a config file and `--set` overrides describe. Raises MegalmError if they are wrong."""
    loaded = load(config, RunConfig, overrides)
    arguments = [script(TRAIN), "--config", config, *(part for each in overrides for part in ("--set", each))]
    return Target(arguments, Path(loaded.run.directory), loaded)


def of_command(arguments: list[str], otherwise: Path) -> Target:
    """The target of a command line `SCRIPT ARGUMENT ...`. otherwise: the folder of what is no training.

    Raises MegalmError for a script that is not there and for a training whose config is wrong.
    """
    path = script(arguments[0])
    if Path(path).resolve() != (REPOSITORY / TRAIN).resolve():
        return Target([path, *arguments[1:]], otherwise)
    config, overrides, rest = None, [], list(arguments[1:])
    while rest:
        part = rest.pop(0)
        name, equals, value = part.partition("=")
        if name in ("--config", "--set", "--resume"):
            if not equals and not rest:
                raise MegalmError(f"{name} needs a value: {arguments[0]} --config FILE [--set KEY=VALUE ...]")
            value = value if equals else rest.pop(0)
            if name == "--config":
                config = value
            else:
                overrides.append(value if name == "--set" else f"checkpoint.resume={value}")
        else:
            raise MegalmError(f"{arguments[0]} has no argument {part}: it takes --config FILE [--set KEY=VALUE ...]")
    if config is None:
        raise MegalmError(f"{arguments[0]} needs --config FILE: name the YAML of the run")
    return training(config, overrides)


def script(path: str) -> str:
    """A script of the working folder, or of the repository that this launcher is part of."""
    if Path(path).is_file():
        return path
    if (REPOSITORY / path).is_file():
        return str(REPOSITORY / path)
    raise MegalmError(f"there is no script {path}, here or in {REPOSITORY}: name a Python file such as {TRAIN}")
