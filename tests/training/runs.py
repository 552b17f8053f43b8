"""What ranks do in the tests of this folder: a whole run, as train.py makes it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.tensors import Reader


def train_run(tree: dict[str, Any], sabotage: Callable[[Any], None] | None = None, picture: bool = False) -> int:
    """Train as train.py does; returns the exit code. sabotage is given the Run before its first step. picture: draw
    it, which takes half a second."""
    from megalm.parallel import device
    from megalm.training.build import build
    from megalm.training.callbacks.metrics import Metrics
    from megalm.training.config import RunConfig
    from megalm.training.loop import train
    from megalm.training.plan import plan
    from megalm.training.run import Run

    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    planned = plan(RunConfig.model_validate(tree), int(os.environ["WORLD_SIZE"]))
    Run.say = _note  # type: ignore[method-assign]
    if not picture:
        Metrics._draw = lambda self, run: None  # type: ignore[method-assign]
    run = build(planned, device.choose("cpu"))
    if sabotage:
        sabotage(run)
    return train(run)


def _note(run: Any, message: str) -> None:
    """What the run says, in said.txt."""
    if run.is_main:
        run.directory.mkdir(parents=True, exist_ok=True)
        with (run.directory / "said.txt").open("a") as file:
            file.write(message + "\n")


def curve(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's records, without what a clock or the machine decides."""
    path = Path(tree["run"]["directory"]) / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "tokens_per_second", "memory")} for r in records]


def state(tree: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and moments, by the place where its layout keeps it."""
    folder = Path(tree["run"]["directory"]) / "checkpoints" / f"step-{step}"
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def whole_state(tree: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, whatever layout wrote it."""
    folder = Path(tree["run"]["directory"]) / "checkpoints" / f"step-{step}"
    manifest = manifests.read(folder)
    with Reader(folder, manifest) as reader:
        return {
            f"{name}/{kind}": reader.whole(name, kind)
            for name, entry in manifest.parameters.items()
            for kind in entry["kinds"]
        }


class SignalAt:
    """Send this process (rank `rank` of the run) signals, one after the other, in the middle of step `step`."""

    def __init__(self, numbers: list[int], step: int, rank: int = 0):
        self.numbers, self.step, self.rank = numbers, step, rank

    def __call__(self, run: Any) -> None:
        right = run.engine.step

        def step(*args: Any) -> Any:
            if run.step == self.step and run.groups.rank == self.rank:
                for number in self.numbers:
                    os.kill(os.getpid(), number)
            return right(*args)

        run.engine.step = step


class NaNAt:
    """Make the loss of step `step` (counted from 0, over the life of the process) not a number on every rank."""

    def __init__(self, step: int, factor: float = float("nan")):
        self.step, self.factor = step, factor

    def __call__(self, run: Any) -> None:
        weigh, count = run.engine._weigh, 0

        def broken(*args: Any) -> Any:
            nonlocal count
            batches, tokens = weigh(*args)
            if run.engine.module.training or run.engine.__class__.__name__ == "_PipelineEngine":
                count += 1
            if count == self.step + 1:
                batches = [(inputs, (labels, weights * self.factor)) for inputs, (labels, weights) in batches]
            return batches, tokens

        run.engine._weigh = broken


class CrashAt:
    """Raise in the middle of step `step`, as a bug or a broken device would."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, run: Any) -> None:
        right = run.engine.step

        def step(*args: Any) -> Any:
            if run.step == self.step:
                raise RuntimeError("planted crash")
            return right(*args)

        run.engine.step = step
