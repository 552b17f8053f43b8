"""What of a model is trained: adapters beside its projections, frozen weights, and how fast each layer learns."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from megalm.errors import MegalmError
from megalm.models.config import ModelConfig, TuningConfig
from megalm.models.decoder import LayerSpec, build_model, decoder
from megalm.nn.adapter import ADAPTERS, adapt
from megalm.nn.gate import gate
from megalm.nn.layers import Layers

HEAD = "classifier"
"""The layer of a task's head."""


def tuned_decoder(
    config: ModelConfig, tuning: TuningConfig, layers: Layers, *, seed: int, **options: Any
) -> list[LayerSpec]:
    """The layers of a model, with adapters, the noise and the gate of `tuning`. options: decoder()'s."""
    return tuned(decoder(config, layers, seed=seed, noise=tuning.neftune_alpha, **options), tuning, layers)


def tuned(specs: Sequence[LayerSpec], tuning: TuningConfig, layers: Layers) -> list[LayerSpec]:
    """`specs` with the adapters of `tuning`, and its gate before the head."""

    def dress(spec: LayerSpec) -> LayerSpec:
        def build() -> nn.Module:
            layer = spec.build()
            if tuning.adapts:
                for name, projection in projections(spec.name, layer):
                    if is_target(name, tuning.targets):
                        directional = tuning.method == "dora"
                        adapt(projection, layers, rank=tuning.rank, alpha=tuning.alpha, directional=directional)
            return gate(layer) if tuning.head_first_steps and spec.name == HEAD else layer

        return replace(spec, build=build)

    return [dress(spec) for spec in specs]


def projections(name: str, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The projections within a layer called `name`, by full name: what has a matrix of weights, in a block."""
    if not name.startswith("blocks."):
        return []
    found = ((f"{name}.{inner}", module, getattr(module, "weight", None)) for inner, module in layer.named_modules())
    return [(full, module) for full, module, weight in found if isinstance(weight, nn.Parameter) and weight.ndim == 2]


def is_target(projection: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches a projection's full name or the end of it."""
    return _matches(projection, [form for pattern in patterns for form in (pattern, f"*.{pattern}")])


def is_added(name: str) -> bool:
    """Whether a parameter belongs to what tuning adds to a model: adapters, and a task's head."""
    return name.rpartition(".")[2] in ADAPTERS or is_head(name)


def is_trained(name: str, tuning: TuningConfig) -> bool:
    """Whether the parameter with this full name is trained."""
    if _matches(name, tuning.freeze):
        return False
    return not tuning.adapts or is_added(name) or _matches(name, tuning.also_train)


def is_head(name: str) -> bool:
    return name.startswith(f"{HEAD}.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze(named: Iterable[tuple[str, nn.Parameter]], tuning: TuningConfig) -> None:
    """Tell autograd and the optimizer which parameters, given by full name, are not trained."""
    for name, parameter in named:
        parameter.requires_grad_(is_trained(name, tuning))


def rate_scale(name: str, tuning: TuningConfig, num_layers: int) -> float:
    """The learning rate of a parameter, by full name, as a share of the run's.

    Layer-wise decay: with L blocks, block i has decay^(L - i), embedding and positions decay^(L + 1), and the last norm
    and the head 1 (Clark et al. 2020; counted as in Bao et al. 2022, BEiT).
    """
    layer, _, rest = name.partition(".")
    if layer == "blocks":
        depth = num_layers - int(rest.partition(".")[0])
    else:
        depth = num_layers + 1 if layer in ("embedding", "positions") else 0
    return tuning.layer_decay**depth * (1.0 if is_head(name) else tuning.body_rate)


def shapes(config: ModelConfig, tuning: TuningConfig) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every parameter of a model, adapters included."""
    with torch.device("meta"):
        model = build_model(tuned_decoder(config, tuning, Layers(), seed=0), seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_weights().items()}


def check(shapes: Mapping[str, tuple[int, ...]], tuning: TuningConfig, *, tied: bool) -> None:
    """Hold patterns and the head's keys against a model's shapes(). tied: whether its head is the embedding's table.

    Raises MegalmError for a pattern that matches nothing, for keys of a head that is not there, and if nothing is left
    to train.
    """
    names = list(shapes)
    matrices = [name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2]
    modules = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    for pattern in tuning.targets if tuning.adapts else ():
        if not any(is_target(module, [pattern]) for module in modules):
            raise MegalmError(_nothing("targets", pattern, modules))
    for key in ("freeze", "also_train"):
        for pattern in getattr(tuning, key):
            if not any(_matches(name, [pattern]) for name in names):
                tie = " (the head is embedding.table.weight: it is tied)" if tied and pattern.startswith("head") else ""
                raise MegalmError(_nothing(key, pattern, names) + tie)
    if not any(map(is_head, names)):
        for key, given in (("body_rate", tuning.body_rate != 1.0), ("head_first_steps", tuning.head_first_steps)):
            if given:
                raise MegalmError(
                    f"tuning.{key} is {getattr(tuning, key)} and the model has no task head ({HEAD}): leave it out"
                )
    if not any(is_trained(name, tuning) for name in names):
        raise MegalmError("tuning.freeze names every parameter, so that nothing is trained: leave some of them out")


def _nothing(key: str, pattern: str, names: Iterable[str]) -> str:
    """A sentence about a pattern that matches none of the names, with the closest of them."""
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"tuning.{key}: {pattern} matches nothing in this model; the closest names are {', '.join(close)}"
