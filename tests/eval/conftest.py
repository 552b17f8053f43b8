"""A small model, a tokenizer whose every id is a byte, and checkpoints of them; no engine needed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors

from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, build_model, decoder
from megalm.nn.layers import Layers
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from tests.checkpoint import writing
from tests.distributed.ranks import Pool

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "init_std": 0.12,  # large enough that every part matters to the logits
    "scale_output_init": False,
}


def save_tokenizer(folder: Path, ends: tuple[str, ...] = ("<|endoftext|>",), begin: str | None = None) -> Path:
    """A tokenizer.json of the 256 bytes and the special tokens `ends`, the first of which ends documents. begin: the
    one that it puts before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ends))
    if begin:
        special = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ends[0], "bos_token": begin}))
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load(tokenizer_path)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Path]:
    return save_tokenizer


def build(**changes: Any) -> tuple[LayerList, ModelConfig]:
    """A model whose norms are drawn too: at their first value, one, they would hide mistakes."""
    config = ModelConfig(**SIZES | changes)
    model = build_model(decoder(config, Layers(), seed=0, segmented=False), seed=3).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model, config


@pytest.fixture(scope="session")
def make_model() -> Callable[..., tuple[LayerList, ModelConfig]]:
    return build


def cut(name: str) -> int | None:
    """The dimension along which tensor parallelism cuts a weight."""
    summed = "attention.output" in name or "feed_forward.down" in name
    if "norm" in name or "positions" in name or (summed and name.endswith("bias")):
        return None
    return 1 if summed else 0


def save_checkpoint(
    directory: Path,
    model: LayerList,
    config: ModelConfig,
    tokenizer_path: Path,
    *,
    step: int = 20,
    pipeline: int = 1,
    tensor: int = 1,
    fingerprint: str | None = None,
) -> Path:
    """A checkpoint as the ranks of this layout write it. fingerprint: of the tokenizer, as the loader records it."""
    whole = writing.with_moments({name: parameter.detach() for name, parameter in model.named_weights().items()})
    names = list(whole)
    everyone = writing.ranks(
        whole, cut, lambda name: names.index(name) * pipeline // len(names), pipeline=pipeline, tensor=tensor
    )
    return writing.save(
        directory,
        everyone,
        {"pipeline": pipeline, "data": 1, "tensor": tensor},
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        step=step,
        tokens=step * 1024,
        config={"model": config.model_dump(), "data": {"tokenizer": str(tokenizer_path)}},
        data={"samples": 320, "blend": {"tokenizer": fingerprint}} if fingerprint else {},
        versions={"megalm": "0.1.0"},
    )[0]


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    return save_checkpoint


@pytest.fixture(scope="session")
def on_four_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Runs a function of (*args) on four gloo ranks, the same ones for all tests; its results in rank order."""
    pools: list[Pool] = []

    def run(function: Callable[..., Any], *args: Any) -> list[Any]:
        if not (pools and pools[-1].usable):
            close()
            pools.append(Pool(4))
        return pools[-1].run(function, *args)

    def close() -> None:
        for pool in pools:
            pool.close()

    yield run
    close()
