"""A run's state to and from its checkpoints."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import weights
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError
from megalm.nn.init import spec_of
from megalm.training.config import RunConfig
from megalm.training.plan import Plan
from megalm.training.run import Run

SHARDS = "deepspeed"
"""Folder inside a checkpoint with DeepSpeed's own files: optimizer, master weights, loss scale."""

_BYTES_PER_PARAMETER = 20
"""fp32 master weights and two moments, and the weights twice, in up to fp32."""

_SAME = (
    ("model", "it would be another model"),
    ("run.seed", "the samples would come in another order"),
    ("train.global_batch_size", "the samples would come in another order"),
    ("train.sequence_length", "the samples would be cut elsewhere"),
    ("train.precision", "the optimizer's state would not fit"),
    ("parallel.zero", "the optimizer's shards would not fit"),
    ("parallel.pipeline_schedule", "the stages would not fit"),
    ("parallel.offload_optimizer", "the optimizer's shards would not fit"),
    ("data.attend_across_documents", "the samples would be masked otherwise"),
)
"""Keys a run keeps for life, and what would happen otherwise."""


def directory(config: RunConfig) -> Path:
    return Path(config.run.directory) / "checkpoints"


def find(config: RunConfig) -> Path | None:
    """The checkpoint that checkpoint.resume asks for, or None for a fresh run.

    A named checkpoint of another folder starts a run; once that run has its own, it continues from those, so that the
    same command can be given again. A crash's leftovers are put right first.

    Raises MegalmError if `never` meets a run that exists, or a named checkpoint does not.
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
        named = checkpoints.resolve(Path(wanted))
        return newest if newest and named.resolve().parent != own.resolve() else named
    return newest


def check(manifest: Manifest, plan: Plan, name: str) -> None:
    """Refuse to continue with another model, order of samples or layout, naming the key."""
    ours = plan.config.model_dump()
    for path, why in _SAME:
        then, now = _at(manifest.config, path), _at(ours, path)
        if isinstance(then, dict) and isinstance(now, dict):
            path, then, now = next(
                ((f"{path}.{k}", then.get(k), now[k]) for k in now if then.get(k) != now[k]), ("", 0, 0)
            )
        if then != now:
            raise MegalmError(
                f"{name} was trained with {path}={then} and the config says {now}: {why}; "
                f"set {path}={then}, or choose another run.directory"
            )
    layout = _layout(plan)
    if manifest.layout != layout:
        raise MegalmError(
            f"{name} was written by {_words(manifest.layout)} and this run has {_words(layout)}: "
            "resuming on another layout is not supported yet, start the same ranks and degrees"
        )


def save(run: Run) -> None:
    """Write RUN/checkpoints/step-N. Every rank calls it."""
    manifest = Manifest(
        step=run.step,
        tokens=run.tokens,
        config=run.config.model_dump(),
        layout=_layout(run.plan),
        data=run.data_state,
        trainer={type(callback).__name__: state for callback in run.callbacks if (state := callback.state())},
        parameters=_parameters(run),
        files={},
        versions={name: version(name) for name in ("megalm", "torch", "deepspeed", "megatron-core")},
    )
    checkpoints.save(
        directory(run.config),
        manifest,
        lambda folder: _write(run, folder),
        run.groups,
        keep_last=run.config.checkpoint.keep_last,
        needed=run.engine.num_parameters * _BYTES_PER_PARAMETER,
    )
    run.say(f"saved {directory(run.config) / f'step-{run.step}'}")


def restore(run: Run, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into the engine and the callbacks; returns the loader's state. Every rank calls it."""
    manifest = checkpoints.verify(folder, run.groups)
    check(manifest, run.plan, str(folder))
    for change in _changes(manifest.config, run.config.model_dump()):
        run.say(f"changed since {folder.name}: {change}")
    run.engine.load(folder, SHARDS)
    run.step, run.tokens = manifest.step, manifest.tokens
    for callback in run.callbacks:
        if (state := manifest.trainer.get(type(callback).__name__)) is not None:
            callback.restore(state)
    return manifest.data


def roll_back(run: Run) -> int:
    """Weights, optimizer and step of the newest checkpoint; the samples go on where they are. Returns the step.

    Raises MegalmError if there is no checkpoint yet.
    """
    newest = run.groups.decide(lambda: checkpoints.newest(directory(run.config)))
    if newest is None:
        raise MegalmError(
            f"step {run.step}: nothing to roll back to, {directory(run.config)} holds no checkpoint yet: "
            "lower checkpoint.every or set the policy to skip"
        )
    manifest = checkpoints.verify(newest, run.groups)
    run.engine.load(newest, SHARDS)
    run.step, run.tokens = manifest.step, manifest.tokens
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


def _parameters(run: Run) -> dict[str, Any]:
    """The manifest's table of weights, in the order of the layers."""
    tensor_size = run.plan.layout.tensor
    mine = {
        name: weights.describe(parameter, spec_of(parameter).shard_dim, tensor_size)
        for name, parameter in run.engine.named_weights(run.layer_names)
    }
    everyone: dict[str, Any] = {}
    for part in run.groups.gather(mine if run.groups.data_rank == 0 and run.groups.tensor_rank == 0 else {}):
        everyone |= part
    order = {name: index for index, name in enumerate(run.layer_names)}
    layer_of = {name: max((layer for layer in order if name.startswith(layer + ".")), key=len) for name in everyone}
    return dict(sorted(everyone.items(), key=lambda item: order[layer_of[item[0]]]))


def _write(run: Run, folder: Path) -> None:
    """This rank's files: DeepSpeed's shards, and weights once per (stage, tensor) slice."""
    with checkpoints.together(run.groups, folder):  # whoever failed here would be missed while weights are gathered
        run.engine.save(folder, SHARDS)
    named = run.engine.named_weights(run.layer_names)
    if run.groups.data_rank == 0:
        weights.write(folder, run.groups.stage, run.groups.tensor_rank, named)
    else:
        for _ in named:  # under ZeRO 3 every data-parallel rank takes part in gathering each weight
            pass
