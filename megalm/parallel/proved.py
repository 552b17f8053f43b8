"""Which configs are proved to train the model that one process of plain torch trains.

A test holds layouts on up to 8 ranks against that process (tests/distributed/matrix.py) and writes what held to
proved.json. Two things are asked of a config: that its signature (what its layout makes the engine do, without the
degrees) was proved, and that each feature of its model and data was proved under each value of the signature.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from megalm.layout import Layout

SEPARATOR = " | "
NOT_PROVED = "is not proved to train the model that one process trains"
AXES = {
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "data": "data-parallel ranks",
    "zero": "parallel.zero",
    "offload": "parallel.offload_optimizer",
    "recompute": "parallel.recompute",
    "precision": "train.precision",
    "accumulation": "micro-batches per step",
}
"""Axes of a signature, and the config key or number that decides each."""
FEATURES = {
    "position": "model.position",
    "rope_scaling": "model.rope_scaling.kind",
    "rotary_fraction": "model.rotary_fraction",
    "parallel_residual": "model.parallel_residual",
    "norm": "model.norm",
    "activation": "model.activation",
    "key_value_heads": "model.num_key_value_heads",
    "head_dim": "model.head_dim",
    "qk_norm": "model.qk_norm",
    "sliding_window": "model.sliding_window",
    "attention_bias": "model.attention_bias",
    "attention_output_bias": "model.attention_output_bias",
    "mlp_bias": "model.mlp_bias",
    "hidden_dropout": "model.hidden_dropout",
    "attention_dropout": "model.attention_dropout",
    "vocabulary": "model.vocab_size",
    "tie_word_embeddings": "model.tie_word_embeddings",
    "head": "model.head",
    "z_loss": "model.z_loss",
    "stages": "model.num_layers",
    "documents": "data.attend_across_documents",
    "clipping": "optimizer.gradient_clipping",
    "tuning": "tuning.method",
    "frozen": "tuning.freeze",
    "rates": "tuning.layer_decay",
    "neftune": "tuning.neftune_alpha",
}
"""Features, and the config key that decides each."""


def signature(config: Any, layout: Layout, accumulation: int) -> dict[str, str]:
    """What the layout of `config` (a training.config.RunConfig) makes the engine do, by axis."""
    parallel = config.parallel
    several = ">1 with sequence_parallel" if parallel.sequence_parallel else ">1"
    return {
        "tensor": several if layout.tensor > 1 else "1",
        "pipeline": parallel.pipeline_schedule if layout.pipeline > 1 else "1",
        "data": _number(layout.data),
        "zero": str(parallel.zero),
        "offload": _switch(parallel.offload_optimizer),
        "recompute": parallel.recompute,
        "precision": config.train.precision,
        "accumulation": _number(accumulation),
    }


def features(config: Any, layout: Layout) -> dict[str, str]:
    """What the model and data of `config` ask of a layout, by feature. model.vocab_size must be filled in."""
    model, tuning, parallel = config.model, config.tuning, config.parallel
    pieces = layout.pipeline * (2 if parallel.pipeline_schedule == "dualpipev" else 1)
    if model.key_value_heads == model.num_attention_heads:
        heads = "one per query head"
    else:
        heads = "fewer" if model.key_value_heads % layout.tensor == 0 else "fewer than tensor ranks"
    return {
        "position": model.position,
        "rope_scaling": model.rope_scaling.kind if model.rope_scaling else "none",
        "rotary_fraction": "part" if model.position == "rotary" and model.rotary_fraction < 1 else "whole",
        "parallel_residual": _switch(model.parallel_residual),
        "norm": model.norm,
        "activation": model.activation,
        "key_value_heads": heads,
        "head_dim": "hidden_size / heads"
        if model.head_width * model.num_attention_heads == model.hidden_size
        else "set",
        "qk_norm": _switch(model.qk_norm),
        "sliding_window": _switch(model.sliding_window),
        "attention_bias": _switch(model.attention_bias),
        "attention_output_bias": _switch(model.attention_output_bias),
        "mlp_bias": _switch(model.mlp_bias),
        "hidden_dropout": _switch(model.hidden_dropout),
        "attention_dropout": _switch(model.attention_dropout),
        "vocabulary": "padded" if model.padded_vocab_size() != model.vocab_size else "whole",
        "tie_word_embeddings": _switch(model.is_tied),
        "head": model.head,
        "z_loss": _switch(model.z_loss),
        "stages": "uneven" if model.num_layers % pieces else "even",
        "documents": "apart" if config.segmented else "seen across",
        "clipping": _switch(config.optimizer.gradient_clipping),
        "tuning": tuning.method,
        "frozen": _switch(tuning.freeze),
        "rates": "by layer" if (tuning.layer_decay, tuning.body_rate) != (1.0, 1.0) else "one",
        "neftune": _switch(tuning.neftune_alpha),
    }


def _number(count: int) -> str:
    return ">1" if count > 1 else "1"


def _switch(value: Any) -> str:
    return "on" if value else "off"


def signature_name(signature: Mapping[str, str]) -> str:
    """A signature as proved.json writes it."""
    return SEPARATOR.join(signature[axis] for axis in AXES)


def pair_names(signature: Mapping[str, str], features: Mapping[str, str]) -> list[str]:
    """Every feature under every axis, as proved.json writes them."""
    return [_pair(feature, value, axis, signature[axis]) for feature, value in features.items() for axis in AXES]


def _pair(feature: str, value: str, axis: str, there: str) -> str:
    return SEPARATOR.join((f"{feature} {value}", f"{axis} {there}"))


@dataclass(frozen=True)
class Proved:
    """What held, as signature_name and pair_names call it."""

    signatures: frozenset[str]
    pairs: frozenset[str]

    def problem(self, config: Any, layout: Layout, accumulation: int) -> str | None:
        """What of `config` (with model.vocab_size) is not proved, and the nearest that is; None if all of it is."""
        ours = signature(config, layout, accumulation)
        if signature_name(ours) not in self.signatures:
            return f"{_said(ours)} {NOT_PROVED}{self._nearest(ours)}"
        for feature, value in features(config, layout).items():
            for axis, here in ours.items():
                if _pair(feature, value, axis, here) not in self.pairs:
                    others = [there for there in self._values(axis) if _pair(feature, value, axis, there) in self.pairs]
                    instead = f" (it is with {AXES[axis]} {' or '.join(others)})" if others else ""
                    return f"{FEATURES[feature]} ({value}) with {AXES[axis]} {here} {NOT_PROVED}{instead}"
        return None

    def _signatures(self) -> list[dict[str, str]]:
        return [dict(zip(AXES, name.split(SEPARATOR), strict=True)) for name in sorted(self.signatures)]

    def _values(self, axis: str) -> list[str]:
        return sorted({signature[axis] for signature in self._signatures()})

    def _nearest(self, ours: Mapping[str, str]) -> str:
        """The proved signature with the fewest changes, as words."""
        changes = [
            {axis: value for axis, value in theirs.items() if value != ours[axis]} for theirs in self._signatures()
        ]
        return f" (it is with {_said(min(changes, key=len))})" if changes else ""


def _said(choices: Mapping[str, str]) -> str:
    return ", ".join(f"{AXES[axis]} {value}" for axis, value in choices.items())


@cache
def proved() -> Proved:
    """What the matrix proved of this version of megalm."""
    content = json.loads(files(__package__).joinpath("proved.json").read_text())
    return Proved(frozenset(content["signatures"]), frozenset(content["pairs"]))
