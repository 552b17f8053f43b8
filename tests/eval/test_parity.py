"""Greedy generation gives the tokens that transformers' generate gives on the exported checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megalm.convert.conversion import to_hf
from megalm.eval.generate import Generation, Sampling
from megalm.eval.load import load_model
from megalm.models.decoder import LayerList
from megalm.nn.attention import Attention
from megalm.nn.block import Block
from megalm.nn.position import PositionTable
from tests.convert import models

NEW = 32


def forget_head_norms(model: LayerList) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.query_norm = module.key_norm = None


def move_positions(model: LayerList) -> None:
    (table,) = (module for module in model.modules() if isinstance(module, PositionTable))
    for weight in table.parameters():
        weight.copy_(weight.roll(1, 0))


def one_after_the_other(model: LayerList) -> None:
    for module in model.modules():
        if isinstance(module, Block):
            module.parallel_residual = False


def change(**changes: object) -> Callable[[LayerList], None]:
    def mistake(model: LayerList) -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.config = module.config.model_copy(update=changes)

    return mistake


MISTAKES: dict[str, list[Callable[[LayerList], None]]] = {
    "llama": [change(rope_theta=5e3)],
    "qwen2": [change(rope_theta=1e4)],
    "qwen3": [forget_head_norms],
    "gpt2": [move_positions],
    "gpt-neox": [change(rotary_fraction=1.0), one_after_the_other],
    "mistral": [change(sliding_window=9), change(sliding_window=None)],
}


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (length,), generator=draw).tolist() for length in (1, 5, 14, 31)]


def greedy(model: LayerList, context: int) -> list[list[int]]:
    """The next ids of each prompt, all in one batch."""
    rows = Generation(
        model,
        prompts(),
        context=context,
        vocab_size=257,
        ends=[],
        max_new_tokens=NEW,
        sampling=Sampling(temperature=0),
        seed=0,
    )
    steps = [rows.step() for _ in range(NEW)]
    return [[step[row] for step in steps] for row in range(len(prompts()))]


def theirs(folder: Path) -> list[list[int]]:
    """The same of a Hugging Face folder, padded on the left."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.generation_config.eos_token_id = None  # so that every row goes on to the end
    longest = max(map(len, prompts()))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in prompts()])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts()])
    out = model.eval().generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


@pytest.mark.parametrize("name", MISTAKES)
def test_greedy_equals_transformers(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    kind, changes = models.MODELS[name]
    model, config = models.build(**changes | {"vocab_size": 257, "init_std": 0.3})
    checkpoint = models.checkpoint(tmp_path / "run", model, config, tokenizer_path, pipeline=2, tensor=2)
    assert to_hf(checkpoint, tmp_path / "hf", verify=False).architecture.model_type == kind
    expected = theirs(tmp_path / "hf")
    assert all(len(row) == NEW and len(set(row)) > 5 for row in expected), "rows that repeat themselves hide mistakes"
    assert greedy(load_model(checkpoint)[0], config.max_position_embeddings) == expected
    for mistake in MISTAKES[name]:  # negative controls
        wrong, *_ = load_model(checkpoint)
        mistake(wrong)
        assert greedy(wrong, config.max_position_embeddings) != expected
