"""Small models of every architecture, with weights that hide nothing, and their checkpoints at any layout."""

import functools
from pathlib import Path
from typing import Any

import torch

from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, build_model, decoder
from megalm.nn.config import RopeScaling
from megalm.nn.layers import Layers
from megalm.tokenizer.load import load
from tests.checkpoint import writing

SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "pad_vocab_to_multiple_of": 128,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_layers": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "init_std": 0.12,  # large enough that every part matters to the logits
    "scale_output_init": False,
}
BIASES = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), True)
NEOX = BIASES | {"norm": "layernorm", "activation": "gelu", "rotary_fraction": 0.5, "parallel_residual": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (model_type, changes)
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama-biases-tied": ("llama", BIASES | {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-linear": ("llama", {"rope_scaling": RopeScaling(kind="linear", factor=4.0), "rope_theta": 5e5}),
    "llama-llama3": (
        "llama",
        {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32)},
    ),
    "llama-yarn": (
        "llama",
        {"rope_scaling": RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=32)},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "attention_bias": True, "rope_theta": 1e6}),
    "qwen2-window-tied": ("qwen2", {"attention_bias": True, "sliding_window": 8, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "qk_norm": True, "head_dim": 16, "norm_eps": 1e-6}),
    "qwen3-biases": ("qwen3", {"qk_norm": True, "attention_bias": True, "attention_output_bias": True}),
    "gpt2": (
        "gpt2",
        BIASES | {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "tie_word_embeddings": True},
    ),
    "gpt2-untied": ("gpt2", BIASES | {"norm": "layernorm", "activation": "relu", "position": "learned"}),
    "gpt-neox": ("gpt_neox", NEOX),
    "gpt-neox-sequential": ("gpt_neox", NEOX | {"parallel_residual": False, "rotary_fraction": 1.0}),
}


def build(**changes: Any) -> tuple[LayerList, ModelConfig]:
    """A model whose norms and biases are drawn too: at their first values they would hide mistakes."""
    config = ModelConfig(**SIZES | changes)
    model = build_model(decoder(config, Layers(), seed=0, segmented=False), seed=3).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model, config


def cut(name: str) -> int | None:
    """The dimension along which tensor parallelism cuts a weight."""
    row = "attention.output" in name or "feed_forward.down" in name
    if "norm" in name or name.startswith(("positions", "classifier")) or (row and name.endswith("bias")):
        return None
    return 1 if row else 0


def checkpoint(
    directory: Path,
    model: LayerList,
    config: ModelConfig,
    tokenizer: Path,
    *,
    pipeline: int = 1,
    data: int = 1,
    tensor: int = 1,
    dtype: str = "float32",
    moments: bool = True,
    blend: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint as the ranks of this layout write it."""
    weights = {name: parameter.detach() for name, parameter in model.named_weights().items()}
    whole = writing.with_moments(weights) if moments else {name: {"weight": weight} for name, weight in weights.items()}
    names = list(whole)
    everyone = writing.ranks(
        whole,
        cut,
        lambda name: names.index(name) * pipeline // len(names),
        pipeline=pipeline,
        data=data,
        tensor=tensor,
    )
    return writing.save(
        directory,
        everyone,
        {"pipeline": pipeline, "data": data, "tensor": tensor},
        dtype=dtype,
        step=20,
        config={"model": config.model_dump(), "data": {"tokenizer": str(tokenizer)}},
        data={"blend": {"tokenizer": _fingerprint(tokenizer), **(blend or {})}},
        versions={"megalm": "0.1.0"},
    )[0]


@functools.cache
def _fingerprint(tokenizer: Path) -> str:
    return load(tokenizer).fingerprint
