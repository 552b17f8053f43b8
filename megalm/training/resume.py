"""A run's state to and from its checkpoints."""

import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint.config import CHANGEABLE
from megalm.checkpoint.folder import NotWritten
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.tensors import Reader, Snapshot
from megalm.convert import start
from megalm.convert.sources import CheckpointSource, Source
from megalm.errors import MegalmError
from megalm.models import tuning as tunings
from megalm.models.config import ModelConfig, TuningConfig
from megalm.optim.adamw import MOMENTS
from megalm.parallel.state import WEIGHT, Piece
from megalm.sft.config import TaskConfig
from megalm.training.config import RunConfig
from megalm.training.plan import Plan
from megalm.training.run import Run

_SAME = (
    ("model", "it would be another model"),
    ("tuning", "other parameters would be trained"),
    ("run.seed", "the samples would come in another order"),
    ("train.global_batch_size", "a step would take other samples"),
    ("train.sequence_length", "the samples would be cut elsewhere"),
    ("train.precision", "the curve would be another"),
    ("train.fp8", "the curve would be another"),
    ("data.attend_across_documents", "the samples would be masked otherwise"),
    ("task", "the examples would be others"),
    ("deepspeed", "DeepSpeed would do otherwise"),
)
"""Keys a run keeps for life, and what would happen otherwise; the loader sees to those that order the samples."""
_FREE = {
    "model": ("attention_backend", "norm_implementation", "init_from"),
    "tuning": ("layer_decay", "body_rate", "head_first_steps"),
    "task": ("none_label", "longest_answer", "labels"),
}
"""Of sections, keys that say how, not what, the model computes and where it once started; as those of the optimizer,
how fast it learns; how answers are scored; and names of classes, which the loader compares as they are found."""
_ABSENT: dict[str, Any] = {"tuning": {}, "train.fp8": False}
"""What checkpoints of versions that did not know a key were trained with."""
_DEFAULTS = {"model": ModelConfig(), "tuning": TuningConfig(), "task": TaskConfig()}


def directory(config: RunConfig) -> Path:
    return Path(config.run.directory) / "checkpoints"


def find(config: RunConfig) -> Path | None:
    """The checkpoint that checkpoint.resume asks for, or None for a fresh run.

    A named checkpoint of another folder starts a run; once that run has its own, it continues from those. One of its
    own takes the run back to it, once; later ones step aside. So the same command can be given again. Its `latest` is
    what `auto` finds. A crash's leftovers are put right first.

    Raises MegalmError if `never` meets a run that exists, a named checkpoint does not exist, or the newest is damaged.
    """
    wanted, own = config.checkpoint.resume, directory(config)
    checkpoints.recover(own)
    newest = checkpoints.newest(own)
    if wanted == "never" and (newest or (Path(config.run.directory) / "metrics.jsonl").exists()):
        where = newest.name if newest else "before its first checkpoint"
        raise MegalmError(
            f"{config.run.directory} already holds a run (at {where}): choose another run.directory, "
            "or --resume auto to continue it"
        )
    if wanted not in ("auto", "never"):
        path, mine = Path(wanted).resolve(), own.resolve()
        if mine in path.parents and path != mine / checkpoints.LATEST:
            return checkpoints.go_back(own, own / path.relative_to(mine))
        if newest is None:
            return checkpoints.resolve(Path(wanted))
    checkpoints.refuse_headless(own)
    return newest


def check(manifest: Manifest, plan: Plan, name: str) -> None:
    """Refuse to continue with another model or other samples, naming the key; the layout may be any."""
    ours = plan.config.model_dump()
    allowed = plan.config.checkpoint.allow_changes
    for path, why in _SAME:
        then, now = _at(manifest.config, path), _at(ours, path)
        if then is None:
            then = _ABSENT.get(path)
        if path in _DEFAULTS and then is not None and now is not None:
            then = _DEFAULTS[path].model_dump() | then  # of a version that did not know some keys yet
            kept = [key for key in now if key not in _FREE[path]]
            changed = [(f"{path}.{key}", then.get(key), now[key]) for key in kept if then.get(key) != now[key]]
        else:
            changed = [(path, then, now)] if then != now else []
        for key, before, after in changed:
            if key in allowed:
                continue
            otherwise = (
                f", or allow it with checkpoint.allow_changes=[{key}] ({CHANGEABLE[key]})" if key in CHANGEABLE else ""
            )
            raise MegalmError(
                f"{name} was trained with {key}={before} and the config says {after}: {why}; "
                f"set {key}={before}, choose another run.directory{otherwise}"
            )


def saved_numbers(sizes: Iterable[tuple[str, int]], tuning: TuningConfig) -> int:
    """fp32 numbers that a checkpoint holds of parameters or parts of them, by (full name, size): weights, and moments
    where they are trained."""
    return sum(size * (1 + len(MOMENTS) * tunings.is_trained(name, tuning)) for name, size in sizes)


def save(run: Run, *, wait: bool) -> None:
    """Write RUN/checkpoints/step-N, beside the training that goes on unless `wait`. Every rank calls it.

    Raises NotWritten if `wait` and it cannot be written.
    """
    started = time.perf_counter()
    settle(run, wait=True)
    manifest = Manifest(
        step=run.step,
        tokens=run.tokens,
        config=run.config.model_dump(),
        layout=_layout(run.plan),
        data=run.data_state,
        trainer={type(callback).__name__: state for callback in run.callbacks if (state := callback.state())},
        optimizer={"updates": run.engine.state.updates, "loss_scale": run.engine.state.scale()},
        parameters={},
        files={},
        versions={name: version(name) for name in ("megalm", "torch", "deepspeed", "megatron-core")},
    )
    rank, config, ranks = run.groups.rank, run.config.checkpoint, run.beside
    best = run.best

    def write(snapshot: Snapshot) -> Path:
        return checkpoints.save(
            directory(run.config),
            manifest,
            lambda folder: (snapshot.write(folder, rank), snapshot.table),
            ranks,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            best=best,
            needed=run.checkpoint_bytes,
        )

    run.saver.save(run.engine.pieces(run.layer_names), rank, run.engine.weight_dtype, write)
    if wait:
        settle(run, wait=True, fatal=True)
    run.blocked = time.perf_counter() - started


def settle(run: Run, *, wait: bool, fatal: bool = False) -> None:
    """Tell how the save under way ended, if it has; `wait` for that. Every rank calls it.

    Raises NotWritten if `fatal` and it could not be written; otherwise the run goes on and counts.
    """
    outcome = run.saver.outcome(wait=wait)
    if isinstance(outcome, Path):
        run.say(f"saved {outcome}")
        run.event("saved", step=int(outcome.name.removeprefix("step-")), blocked=round(run.blocked, 3))
    elif isinstance(outcome, NotWritten):
        if fatal:
            raise outcome
        run.failed_saves += 1
        run.event("not saved", why=outcome.what)
        newest = checkpoints.newest(directory(run.config)) if run.is_main else None
        run.say(
            f"warning: {outcome.what}; training goes on with {newest or 'no checkpoint'} as the newest one "
            f"({run.failed_saves} not written so far)"
        )


def restore(run: Run, folder: Path) -> None:
    """Load a checkpoint of any layout, which check() let pass, into the engine and callbacks. Every rank calls it."""
    manifest = checkpoints.verify(folder, run.groups)
    for change in _changes(manifest.config, run.config.model_dump()):
        run.say(f"changed since {folder.name}: {change}")
    if manifest.layout != _layout(run.plan):
        run.say(f"{folder.name} was written by {_words(manifest.layout)}: reading it as {_words(_layout(run.plan))}")
    _fill(run, folder, manifest)
    for callback in run.callbacks:
        if (state := manifest.trainer.get(type(callback).__name__)) is not None:
            callback.restore(state)


def open_start(plan: Plan) -> Source | None:
    """The weights that a fresh run starts from, if not from random ones. Raises MegalmError if they do not fit."""
    config = plan.config
    if config.model.init_from is None:
        return None
    path = Path(config.model.init_from)
    labels = plan.task.facts.get("labels", ()) if plan.task else ()
    return start.open_start(path, config.model, plan.tokenizer, config.checkpoint.allow_changes, labels)


@torch.no_grad()
def begin(run: Run, source: Source) -> None:
    """Give the model the weights of `source`; moments, steps and samples start from nothing. Every rank calls it.

    Adapters and a task's head that the source has not stay as drawn; the source's own adapters are in its weights.
    """
    if isinstance(source, CheckpointSource):
        checkpoints.verify(source.path, run.groups)
    with source:
        for piece in _pieces(run, source.path, len(source.shapes)):
            if piece.name not in source.shapes and tunings.is_added(piece.name):
                continue
            weight = source.stretch(
                piece.name,
                piece.shape,
                piece.shard_dim,
                piece.tensor_rank,
                run.plan.layout.tensor,
                piece.start,
                piece.count,
            )
            piece.tensors[WEIGHT].copy_(weight)
    run.engine.state.publish()
    if run.config.tuning.method == "dora":
        run.engine.set_magnitudes()
    run.say(f"the weights are those of {source.path}")


def _pieces(run: Run, folder: Path, parameters: int) -> Iterator[Piece]:
    """What this rank holds of the training state, with a bar that is seen where it takes long, on a terminal."""
    return tqdm(
        run.engine.pieces(run.layer_names, owned=False),
        desc=f"reading {folder.name}",
        total=parameters // run.plan.layout.pipeline,
        delay=5.0,
        leave=False,
        disable=None if run.is_main else True,
    )


@torch.no_grad()
def _fill(run: Run, folder: Path, manifest: Manifest) -> None:
    """Weights, moments and step from a checkpoint."""
    state, tensor_size = run.engine.state, run.plan.layout.tensor
    state.prepare(manifest.optimizer["updates"])
    with Reader(folder, manifest) as reader:
        for piece in _pieces(run, folder, len(manifest.parameters)):
            if list(piece.shape) != (saved := manifest.parameters[piece.name]["shape"]):
                raise MegalmError(
                    f"{folder} holds {piece.name} as {saved} and the config makes it {list(piece.shape)}: it would be "
                    "another model; set model back to what it was, or choose another run.directory"
                )
            for kind, tensor in piece.tensors.items():
                tensor.copy_(
                    reader.stretch(
                        piece.name, kind, piece.shard_dim, piece.tensor_rank, tensor_size, piece.start, piece.count
                    )
                )
    state.publish()
    state.set_scale(manifest.optimizer["loss_scale"])
    run.step, run.tokens = manifest.step, manifest.tokens


def roll_back(run: Run) -> int:
    """Weights, optimizer and step of the newest checkpoint; the samples go on where they are. Returns the step.

    Raises MegalmError if there is no checkpoint yet.
    """
    settle(run, wait=True)
    newest = run.groups.decide(lambda: checkpoints.newest(directory(run.config)))
    if newest is None:
        raise MegalmError(
            f"step {run.step}: nothing to roll back to, {directory(run.config)} holds no checkpoint yet: "
            "lower checkpoint.every or set the policy to skip"
        )
    manifest = checkpoints.verify(newest, run.groups)
    _fill(run, newest, manifest)
    return manifest.step


def _changes(then: Any, now: Any, path: str = "") -> list[str]:
    """Every value that differs between two trees, as `key: before -> after`."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [f"{path.removeprefix('.')}: {then} -> {now}"]
    return [c for key in then | now for c in _changes(then.get(key), now.get(key), f"{path}.{key}")]


def _at(tree: dict[str, Any], path: str) -> Any:
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _layout(plan: Plan) -> dict[str, int]:
    layout = plan.layout
    return {"pipeline": layout.pipeline, "data": layout.data, "tensor": layout.tensor}


def _words(layout: dict[str, int]) -> str:
    return " x ".join(f"{axis} {degree}" for axis, degree in layout.items())
