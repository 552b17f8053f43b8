"""What the tables of architectures are made of: objects that say how a part of a model is spelled on both sides.

Tensors: `export` turns megalm's tensors into Hugging Face's one, `restore` turns it back; neither rounds anything.
Configs: `write` makes keys of config.json from megalm's model keys, `read` makes model keys from config.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.nn.config import HeadKind, RopeScaling
from megalm.nn.position import rotary_attention_factor

# ---- tensors ----


@dataclass(frozen=True)
class Same:
    """A module whose tensors differ by name only. `*` stands for a block's number."""

    ours: str
    theirs: str

    @property
    def modules(self) -> tuple[str, ...]:
        """megalm's modules of which `theirs` is made."""
        return (self.ours,)

    def export(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0]

    def restore(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (tensor,)


class Vocabulary(Same):
    """A table with a row per token id: megalm's has rows of zeros below, that pad it."""

    def export(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0][: config.vocab_size]

    def restore(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (F.pad(tensor, (0, 0, 0, config.padded_vocab_size() - tensor.shape[0])),)


class Transposed(Same):
    """A projection that is kept as [inputs, outputs] there (GPT-2's Conv1D)."""

    def export(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        return tensors[0].t() if tensors[0].dim() == 2 else tensors[0]

    def restore(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return (self.export((tensor,), config),)


@dataclass(frozen=True)
class Fused:
    """Query, key and value in one projection: all queries, then all keys, then all values, as [inputs, outputs]."""

    ours: tuple[str, str, str]
    theirs: str

    @property
    def modules(self) -> tuple[str, ...]:
        return self.ours

    def export(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        whole = torch.cat(list(tensors))
        return whole.t() if whole.dim() == 2 else whole

    def restore(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        return list((tensor.t() if tensor.dim() == 2 else tensor).chunk(3))


class FusedByHead(Fused):
    """Query, key and value in one projection: head by head, each its query, its key and its value."""

    def export(self, tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
        heads = [tensor.view(config.num_attention_heads, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(heads, dim=1).flatten(0, 1)

    def restore(self, tensor: Tensor, config: ModelConfig) -> Sequence[Tensor]:
        heads = tensor.view(config.num_attention_heads, -1, *tensor.shape[1:])
        return [part.flatten(0, 1) for part in heads.chunk(3, dim=1)]


TensorMapping = Same | Fused


# ---- configs ----

REQUIRED = object()
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """A key of config.json. default: what transformers takes where it is left out. names: its value -> megalm's."""

    ours: str
    theirs: str
    default: Any = REQUIRED
    names: Mapping[Any, Any] = field(default_factory=dict)

    def write(self, ours: Values) -> dict[str, Any]:
        value = ours[self.ours]
        if self.names:
            value = next((theirs for theirs, name in self.names.items() if name == value), None)
        return {self.theirs: value}

    def read(self, theirs: Values) -> dict[str, Any]:
        value = theirs.get(self.theirs, self.default)
        if value is REQUIRED:
            raise MegalmError(f"it has no {self.theirs}")
        return {self.ours: self.names.get(value, value) if self.names else value}


@dataclass(frozen=True)
class Fixed:
    """What an architecture always has: model keys, and keys of config.json that must have (or default to) a value."""

    ours: Values
    theirs: Values = field(default_factory=dict)

    def write(self, ours: Values) -> dict[str, Any]:
        return dict(self.theirs)

    def read(self, theirs: Values) -> dict[str, Any]:
        for key, value in self.theirs.items():
            if theirs.get(key, value) != value:
                raise MegalmError(f"it has {key}={theirs[key]}, and only {value} is supported")
        return dict(self.ours)


SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
}
"""Kind of rotary scaling -> the keys that it reads, spelled alike on both sides."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions. theta, fraction: their keys in config.json; share: the fraction where that is left out, or 1 of
    an architecture that always turns whole heads.

    Written as 4.57 reads it (rope_theta, rope_scaling), which later versions do too; read also as later versions write
    it (rope_parameters), which, as for them, counts only where there is no rope_scaling.
    """

    theta: str = "rope_theta"
    fraction: str = "partial_rotary_factor"
    share: float = 1.0

    def write(self, ours: Values) -> dict[str, Any]:
        scaling, theirs = ours["rope_scaling"], {self.theta: ours["rope_theta"], "rope_scaling": None}
        if scaling:
            theirs["rope_scaling"] = {"rope_type": scaling["kind"]} | {
                key: scaling[key] for key in SCALING_KEYS[scaling["kind"]]
            }
        return theirs if self.share == 1.0 else theirs | {self.fraction: ours["rotary_fraction"]}

    def read(self, theirs: Values) -> dict[str, Any]:
        theirs = _without_nulls(theirs)
        given = _without_nulls(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
        theta = given.pop("rope_theta", theirs.get(self.theta, 10000.0))
        fraction = given.pop("partial_rotary_factor", theirs.get(self.fraction, self.share))
        old, kind = given.pop("type", "default"), given.pop("rope_type", None)
        kind = kind or old
        if self.share == 1.0 and fraction != 1.0:  # transformers ignores it, but fails to compute it with a scaling
            if kind != "default":
                raise MegalmError(f"its rotary scaling {kind} has {self.fraction}={fraction}, which is not supported")
            fraction = 1.0
        ours: dict[str, Any] = {"rope_theta": float(theta), "rotary_fraction": float(fraction), "rope_scaling": None}
        if kind == "default":
            return ours
        if kind not in SCALING_KEYS:
            raise MegalmError(f"its rotary scaling is {kind}, and only {', '.join(SCALING_KEYS)} are supported")
        trained = "original_max_position_embeddings"
        if trained in SCALING_KEYS[kind]:
            given[trained] = theirs.get(trained) or given.get(trained) or theirs.get("max_position_embeddings")
            if given[trained] is None:
                raise MegalmError(f"its rotary scaling {kind} has no {trained}")
        scaling = {"kind": kind} | {key: given.pop(key) for key in SCALING_KEYS[kind] if key in given}
        ours["rope_scaling"] = {
            key: value if key in ("kind", trained) else float(value) for key, value in scaling.items()
        }
        if given.pop("truncate", True) is not True:
            given["truncate"] = False
        given.pop(trained, None)
        if "attention_factor" in given:
            usual = rotary_attention_factor(RopeScaling.model_validate(ours["rope_scaling"]))
            if abs(given["attention_factor"] - usual) < 1e-6:
                given.pop("attention_factor")
        if given:
            key, value = next(iter(given.items()))
            raise MegalmError(f"its rotary scaling {kind} has {key}={value}, which is not supported")
        return ours


def _without_nulls(values: Values) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class LayerWindow:
    """A sliding window that config.json could give to some layers only (Qwen)."""

    def write(self, ours: Values) -> dict[str, Any]:
        window = ours["sliding_window"]
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": ours["num_layers"] if window is None else 0,
        }

    def read(self, theirs: Values) -> dict[str, Any]:
        window = theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window", False) else None
        layers = theirs["num_hidden_layers"]
        kinds = theirs.get("layer_types") or [
            "sliding_attention" if i >= theirs.get("max_window_layers", 28) else "full_attention" for i in range(layers)
        ]
        if window is None or set(kinds) == {"full_attention"}:
            return {"sliding_window": None}
        if set(kinds) != {"sliding_attention"}:
            raise MegalmError("only some of its layers have a sliding window, and all or none is supported")
        return {"sliding_window": window}


@dataclass(frozen=True)
class HeadOf:
    """What stands on the last block. The classes' names are not the model's: a conversion puts them in."""

    head: HeadKind

    def write(self, ours: Values) -> dict[str, Any]:
        if self.head == "language_model":
            return {}
        labels = label_keys([f"LABEL_{number}" for number in range(ours["num_labels"])])
        # transformers drops a tenth of what that head sees in training, if nothing is said; here nothing is dropped.
        return labels | ({"classifier_dropout": 0.0} if self.head == "token_classification" else {})

    def read(self, theirs: Values) -> dict[str, Any]:
        if self.head == "language_model":
            return {"head": self.head, "num_labels": None}
        return {"head": self.head, "num_labels": len(theirs.get("id2label") or range(theirs.get("num_labels", 2)))}


def label_keys(names: Sequence[str]) -> dict[str, Any]:
    """config.json's keys for the names of classes."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


ConfigMapping = Key | Fixed | Rope | LayerWindow | HeadOf
