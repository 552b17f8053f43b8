"""The architectures of transformers that megalm reads and writes, a table each. docs/conversion.md adds one.

A model key, a config.json key or a tensor that no table entry mentions cannot be lost in silence: `of_model` takes an
architecture only if the model's keys come back from config.json as they were, and `entries` wants every tensor named.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megalm.convert.mapping import (
    SCALING_KEYS,
    ConfigMapping,
    Fixed,
    Fused,
    FusedByHead,
    HeadOf,
    Key,
    LayerWindow,
    Rope,
    Same,
    TensorMapping,
    Transposed,
    Vocabulary,
)
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.models.decoder import build_model, decoder
from megalm.nn.config import HeadKind
from megalm.nn.layers import Layers


@dataclass(frozen=True)
class Architecture:
    """model_type, model_class: as config.json names it. keys: of the config. tensors: the modules that hold them.

    family: what the names of its classes for other heads begin with. ignored: tensors of published files that are no
    weights (masks and frequencies that are computed). token_head: module of token classification's head.
    question_body: module of the body below question answering's head, where it is another than with other heads.
    """

    model_type: str
    model_class: str
    family: str
    keys: Sequence[ConfigMapping]
    tensors: Sequence[TensorMapping]
    ignored: str = r"rotary_emb\.inv_freq$"
    token_head: str = "score"
    question_body: str | None = None

    def of_head(self, head: HeadKind) -> "Architecture":
        """The architecture with another head, from that with the language model's."""
        if head == "language_model":
            return self
        module = {
            "sequence_classification": "score",
            "token_classification": self.token_head,
            "question_answering": "qa_outputs",
        }[head]
        body = [mapping for mapping in self.tensors if mapping.modules != ("head",)]
        if head == "question_answering" and self.question_body:
            rename = re.compile(r"^[^.]*")
            body = [replace(each, theirs=rename.sub(self.question_body, each.theirs)) for each in body]
        return replace(
            self,
            model_class=f"{self.family}{HEAD_CLASSES[head]}",
            keys=(*(key for key in self.keys if key != HeadOf("language_model")), HeadOf(head)),
            tensors=(*body, Same("classifier", module)),
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """config.json's keys of the model."""
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.model_class]}
        ours = config.model_dump()
        for key in self.keys:
            written |= key.write(ours | maths(ours))
        return written

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """The model's keys from config.json's. Raises MegalmError, to be completed by the caller, for what megalm has
        not."""
        ours: dict[str, Any] = {}
        for key in self.keys:
            ours |= key.read(theirs)
        return ours

    def differences(self, config: ModelConfig) -> list[str]:
        """Keys of a model that do not come back from this architecture's config.json as they are."""
        before = maths(config.model_dump())
        after = maths(ModelConfig().model_dump() | self.read(self.write(config)))
        return sorted(key for key in before | after if before.get(key) != after.get(key))


HEAD_CLASSES: dict[HeadKind, str] = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""What the names of transformers' classes end with."""

SIZES = (
    HeadOf("language_model"),
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("num_layers", "num_hidden_layers"),
    Key("num_attention_heads", "num_attention_heads"),
    Key("intermediate_size", "intermediate_size"),
    Key("max_position_embeddings", "max_position_embeddings", 2048),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
    Key("init_std", "initializer_range", 0.02),
)
GROUPED = (
    Key("num_key_value_heads", "num_key_value_heads", None),
    Key("norm_eps", "rms_norm_eps", 1e-6),
    Fixed({"norm": "rmsnorm", "activation": "swiglu", "position": "rotary"}, {"hidden_act": "silu"}),
    Rope(),
)
BLOCK = (
    Vocabulary("embedding.table", "model.embed_tokens"),
    Same("blocks.*.attention_norm", "model.layers.*.input_layernorm"),
    Same("blocks.*.attention.query", "model.layers.*.self_attn.q_proj"),
    Same("blocks.*.attention.key", "model.layers.*.self_attn.k_proj"),
    Same("blocks.*.attention.value", "model.layers.*.self_attn.v_proj"),
    Same("blocks.*.attention.output", "model.layers.*.self_attn.o_proj"),
    Same("blocks.*.feed_forward_norm", "model.layers.*.post_attention_layernorm"),
    Same("blocks.*.feed_forward.gate", "model.layers.*.mlp.gate_proj"),
    Same("blocks.*.feed_forward.up", "model.layers.*.mlp.up_proj"),
    Same("blocks.*.feed_forward.down", "model.layers.*.mlp.down_proj"),
    Same("norm.norm", "model.norm"),
    Vocabulary("head", "lm_head"),
)
QUERY_KEY_VALUE = ("blocks.*.attention.query", "blocks.*.attention.key", "blocks.*.attention.value")

LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    "Llama",
    (
        *SIZES,
        *GROUPED,
        Key("head_dim", "head_dim", None),
        Key("attention_bias", "attention_bias", False),
        Key("attention_output_bias", "attention_bias", False),
        Key("mlp_bias", "mlp_bias", False),
    ),
    BLOCK,
    question_body="transformer",
)
MISTRAL = Architecture(
    "mistral",
    "MistralForCausalLM",
    "Mistral",
    (
        *SIZES,
        *GROUPED,
        Key("num_key_value_heads", "num_key_value_heads", 8),
        Key("head_dim", "head_dim", None),
        Key("sliding_window", "sliding_window", 4096),
    ),
    BLOCK,
)
QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    "Qwen2",
    (*SIZES, *GROUPED, Key("head_dim", "head_dim", None), LayerWindow(), Fixed({"attention_bias": True})),
    BLOCK,
    question_body="transformer",
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    "Qwen3",
    (
        *SIZES,
        *GROUPED,
        Key("head_dim", "head_dim", 128),
        Key("attention_bias", "attention_bias", False),
        Key("attention_output_bias", "attention_bias", False),
        LayerWindow(),
        Fixed({"qk_norm": True}),
    ),
    (
        *BLOCK,
        Same("blocks.*.attention.query_norm", "model.layers.*.self_attn.q_norm"),
        Same("blocks.*.attention.key_norm", "model.layers.*.self_attn.k_norm"),
    ),
    question_body="transformer",
)
GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2",
    (
        HeadOf("language_model"),
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "n_embd"),
        Key("num_layers", "n_layer"),
        Key("num_attention_heads", "n_head"),
        Key("intermediate_size", "n_inner", None),
        Key("max_position_embeddings", "n_positions"),
        Key("tie_word_embeddings", "tie_word_embeddings", True),
        Key("init_std", "initializer_range", 0.02),
        Key("norm_eps", "layer_norm_epsilon", 1e-5),
        Key(
            "activation",
            "activation_function",
            "gelu_new",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
        ),
        Fixed(
            {"norm": "layernorm", "position": "learned"}
            | dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), True),
            {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        ),
    ),
    (
        Vocabulary("embedding.table", "transformer.wte"),
        Same("positions", "transformer.wpe"),
        Same("blocks.*.attention_norm", "transformer.h.*.ln_1"),
        Fused(QUERY_KEY_VALUE, "transformer.h.*.attn.c_attn"),
        Transposed("blocks.*.attention.output", "transformer.h.*.attn.c_proj"),
        Same("blocks.*.feed_forward_norm", "transformer.h.*.ln_2"),
        Transposed("blocks.*.feed_forward.up", "transformer.h.*.mlp.c_fc"),
        Transposed("blocks.*.feed_forward.down", "transformer.h.*.mlp.c_proj"),
        Same("norm.norm", "transformer.ln_f"),
        Vocabulary("head", "lm_head"),
    ),
    ignored=r"\.attn\.(masked_)?bias$",
    token_head="classifier",
)
GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPTNeoX",
    (
        *SIZES,
        Key("norm_eps", "layer_norm_eps", 1e-5),
        Key(
            "activation",
            "hidden_act",
            "gelu",
            {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
        ),
        Key("attention_bias", "attention_bias", True),
        Key("attention_output_bias", "attention_bias", True),
        Key("parallel_residual", "use_parallel_residual", True),
        Rope("rotary_emb_base", "rotary_pct", 0.25),
        Fixed({"norm": "layernorm", "position": "rotary", "mlp_bias": True}),
    ),
    (
        Vocabulary("embedding.table", "gpt_neox.embed_in"),
        Same("blocks.*.attention_norm", "gpt_neox.layers.*.input_layernorm"),
        FusedByHead(QUERY_KEY_VALUE, "gpt_neox.layers.*.attention.query_key_value"),
        Same("blocks.*.attention.output", "gpt_neox.layers.*.attention.dense"),
        Same("blocks.*.feed_forward_norm", "gpt_neox.layers.*.post_attention_layernorm"),
        Same("blocks.*.feed_forward.up", "gpt_neox.layers.*.mlp.dense_h_to_4h"),
        Same("blocks.*.feed_forward.down", "gpt_neox.layers.*.mlp.dense_4h_to_h"),
        Same("norm.norm", "gpt_neox.final_layer_norm"),
        Vocabulary("head", "embed_out"),
    ),
    ignored=r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$",
    token_head="classifier",
)
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX)

_TRAINING = (
    "init_from",
    "init_std",
    "scale_output_init",
    "z_loss",
    "hidden_dropout",
    "attention_dropout",
    "attention_backend",
    "norm_implementation",
    "pad_vocab_to_multiple_of",
)
"""Model keys that do not enter what a trained model computes."""


def maths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The model keys that say what a model computes, sizes that follow from others filled in."""
    ours = {key: value for key, value in values.items() if key not in _TRAINING}
    sizes = ModelConfig.model_construct(**{key: value for key, value in ours.items() if key != "rope_scaling"})
    ours["tie_word_embeddings"] = sizes.is_tied
    if sizes.head == "language_model":
        ours["num_labels"] = None
    ours["num_key_value_heads"] = sizes.key_value_heads
    ours["head_dim"] = sizes.head_width
    ours["intermediate_size"] = sizes.feed_forward_width
    if ours["position"] != "rotary":
        return ours | {"rope_theta": 10000.0, "rope_scaling": None, "rotary_fraction": 1.0}
    if scaling := ours["rope_scaling"]:
        ours["rope_scaling"] = {key: scaling[key] for key in ("kind", *SCALING_KEYS[scaling["kind"]]) if key in scaling}
    return ours


def of_model(config: ModelConfig) -> Architecture:
    """The architecture that computes what a model of this config does. Raises MegalmError if there is none."""
    known = [architecture.of_head(config.head) for architecture in ARCHITECTURES]
    found = {architecture.model_type: architecture.differences(config) for architecture in known}
    for architecture in known:
        if not found[architecture.model_type]:
            return architecture
    nearest = min(found, key=lambda name: len(found[name]))
    values = maths(config.model_dump())
    reasons = ", ".join(f"model.{key}={values.get(key)}" for key in found[nearest])
    raise MegalmError(
        f"no architecture that megalm writes ({', '.join(found)}) computes this model: the nearest, {nearest}, has no "
        f"place for {reasons}; describe the architecture as docs/conversion.md shows"
    )


def of_json(theirs: Mapping[str, Any], where: str) -> tuple[Architecture, ModelConfig]:
    """The architecture and the model of a config.json. where: its path, for the MegalmError about what megalm lacks."""
    kind = theirs.get("model_type")
    architecture = next((known for known in ARCHITECTURES if known.model_type == kind), None)
    if architecture is None:
        known = ", ".join(known.model_type for known in ARCHITECTURES)
        raise MegalmError(
            f"{where} describes a model of type {kind}, and megalm reads {known}: describe it as docs/conversion.md "
            "shows"
        )
    for head, ending in HEAD_CLASSES.items():
        if any(name.endswith(ending) for name in theirs.get("architectures") or []):
            architecture = architecture.of_head(head)
    if theirs.get("quantization_config"):
        raise MegalmError(f"{where} describes quantised weights: take the folder with the original ones")
    try:
        return architecture, ModelConfig.model_validate(architecture.read(theirs))
    except MegalmError as error:
        raise MegalmError(f"{where} cannot be read as {kind}, {error}: it is another architecture") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise MegalmError(
            f"{where} cannot be read as {kind}, it gives megalm's model.{key} the value {first['input']} "
            f"({first['msg']}): it is another architecture"
        ) from None


@dataclass(frozen=True)
class Entry:
    """A tensor of Hugging Face's folder and megalm's tensors that it is made of, by their full names."""

    ours: tuple[str, ...]
    theirs: str
    mapping: TensorMapping


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full name -> shape of every weight of a model."""
    with torch.device("meta"):
        model = build_model(decoder(config, Layers(), seed=0), seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_weights().items()}


def entries(architecture: Architecture, config: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the table's order, block by block."""
    names = shapes(config)
    found = [entry for entry in _entries(architecture, config) if entry.ours[0] in names]
    mapped = [name for entry in found for name in entry.ours]
    assert sorted(mapped) == sorted(names), f"{architecture.model_type}: {set(names) ^ set(mapped)} have no one place"
    return found


def _entries(architecture: Architecture, config: ModelConfig) -> Iterator[Entry]:
    for block in range(-1, config.num_layers):
        for mapping in architecture.tensors:
            if ("*" in mapping.theirs) != (block >= 0):
                continue
            for suffix in ("weight", "bias"):
                ours = tuple(f"{module}.{suffix}".replace("*", str(block)) for module in mapping.modules)
                yield Entry(ours, f"{mapping.theirs}.{suffix}".replace("*", str(block)), mapping)


def their_shapes(architecture: Architecture, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of Hugging Face's folder."""
    names = shapes(config)
    described = {}
    for entry in entries(architecture, config):
        empty: list[Tensor] = [torch.empty(names[name], device="meta") for name in entry.ours]
        described[entry.theirs] = tuple(entry.mapping.export(empty, config).shape)
    return described


def tied(architecture: Architecture, config: ModelConfig) -> dict[str, str]:
    """Tensor of the head -> of the embedding that it is tied to: a folder may hold both."""
    if not config.is_tied:
        return {}
    theirs = {entry.ours[0]: entry.theirs for entry in _entries(architecture, config)}
    return {theirs["head.weight"]: theirs["embedding.table.weight"]}
