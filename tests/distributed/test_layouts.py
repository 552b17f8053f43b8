"""One seed, one curve: every layout follows one process of plain torch (DESIGN, promise 1)."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from megalm.training.config import RunConfig
from tests.distributed import sabotage
from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, engine_curve, plain_torch

# fp32 sums of a few hundred terms in another order, over 20 steps of AdamW.
LOSS, NORM = 1e-5, 1e-4

GPT = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "z_loss": 1e-3,
}
"""Everything that the default (Llama-like) model has not: biases, tied ends, learned positions."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"parallel": {"zero": 0}}),
    "tensor 2": (2, {"parallel": {"tensor": 2, "zero": 0}, "model": {"qk_norm": True}}),
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}, "model": GPT}),
    "tensor 4, fewer key-value heads": (4, {"parallel": {"tensor": 4}, "model": {"qk_norm": True}}),
    "data 2 segments": (2, {"data": {"attend_across_documents": False}}),
    "tensor 2 x data 2, ZeRO 0": (4, {"parallel": {"tensor": 2, "zero": 0}}),
    "tensor 2 x data 2, ZeRO 1": (4, {"parallel": {"tensor": 2, "zero": 1}}),
    "tensor 2 x data 2, ZeRO 2": (4, {"parallel": {"tensor": 2, "zero": 2}}),
    "tensor 2 x data 2, ZeRO 3": (4, {"parallel": {"tensor": 2, "zero": 3}, "model": {"tie_word_embeddings": True}}),
    "pipeline 2 x data 2, ZeRO 0": (4, {"parallel": {"pipeline": 2, "zero": 0}, "model": GPT}),
    "pipeline 2 x data 2, ZeRO 1": (4, {"parallel": {"pipeline": 2}, "model": GPT}),
    "dualpipev 2": (2, {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"}, "model": GPT}),
    "dualpipev 2 x tensor 2, ZeRO 0": (
        4,
        {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev", "tensor": 2, "zero": 0}},
    ),
    "all three axes": (
        8,
        {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "model": GPT},
    ),
    "recompute selective": (1, {"parallel": {"recompute": "selective"}}),
    "recompute full, ZeRO 3": (2, {"parallel": {"recompute": "full", "zero": 3}}),
    "recompute full, pipeline 2": (2, {"parallel": {"recompute": "full", "pipeline": 2}}),
    "optimizer offload, ZeRO 2": (2, {"parallel": {"offload_optimizer": True, "zero": 2}}),
}


def worst(curve: list[tuple[float, float]], reference: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest relative difference of losses and of gradient norms."""
    ours, theirs = np.array(curve), np.array(reference)
    assert ours.shape == theirs.shape
    loss, norm = (np.abs(ours - theirs) / theirs).max(axis=0)
    return loss, norm


def expected(run: RunConfig) -> list[tuple[float, float]]:
    [curve] = run_ranks(1, plain_torch, run)
    return curve


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_follows_plain_torch(name: str) -> None:
    ranks, sections = LAYOUTS[name]
    run = config(**sections)
    curves = run_ranks(ranks, engine_curve, run)
    assert all(curve == curves[0] for curve in curves), "ranks disagree on loss or norm"
    loss, norm = worst(curves[0], expected(run))
    assert loss < LOSS and norm < NORM, f"{name}: loss off by {loss:.1e}, gradient norm by {norm:.1e}"


def test_dropout_is_the_same_under_every_layout() -> None:
    model = {**GPT, "hidden_dropout": 0.2, "attention_dropout": 0.2}
    alone = run_ranks(1, engine_curve, config(model=model))[0]
    without = expected(config(model=GPT))
    split = {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"}
    spread = run_ranks(8, engine_curve, config(model=model, parallel=split))[0]
    assert worst(spread, alone) < (LOSS, NORM)
    assert worst(alone, without)[0] > 100 * LOSS, "nothing was dropped"


# A bf16 product has 8 significant bits. Sums in another order move an fp32 master weight by 1e-7, which now and then
# flips the rounding of its bf16 copy: curves part by some 1e-4 of the loss, from the second step on.
HALF_FIRST_STEP, HALF_LOSS = 1e-5, 1e-3


def test_bf16_follows_fp32_and_itself() -> None:
    half = {"precision": "bf16"}
    alone = run_ranks(1, engine_curve, config(train=half))[0]
    assert worst(alone, expected(config()))[0] < HALF_LOSS
    tied = run_ranks(1, engine_curve, config(train=half, model=GPT))[0]
    for reference, ranks, sections in (
        (tied, 2, {"parallel": {"pipeline": 2}, "model": GPT}),
        (alone, 4, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
        (alone, 2, {"parallel": {"zero": 2}}),
        (alone, 2, {"parallel": {"zero": 3}}),
    ):
        spread = run_ranks(ranks, engine_curve, config(train=half, **sections))[0]
        assert worst(spread[:1], reference[:1])[0] < HALF_FIRST_STEP
        assert worst(spread, reference)[0] < HALF_LOSS


def test_fp16_scales_its_loss() -> None:
    run = config(train={"precision": "fp16"})
    alone = run_ranks(1, partial(engine_curve, sabotage=sabotage.pretend_fp16), run)[0]
    assert worst(alone, expected(config()))[0] < HALF_LOSS
    pipeline = config(train={"precision": "fp16"}, parallel={"pipeline": 2})
    spread = run_ranks(2, partial(engine_curve, sabotage=sabotage.pretend_fp16), pipeline)[0]
    assert worst(spread, alone)[0] < HALF_LOSS


@pytest.mark.parametrize(
    ("plant", "ranks", "sections"),
    [
        (sabotage.no_reduction_of_input_gradients, 2, {"parallel": {"tensor": 2}}),
        (sabotage.no_reduction_of_norm_gradients, 2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
        (sabotage.swapped_shards, 2, {"parallel": {"tensor": 2}}),
        (sabotage.mean_of_micro_batch_means, 2, {}),
        (sabotage.shifted_labels, 1, {}),
        (sabotage.norm_counts_every_copy, 2, {"parallel": {"tensor": 2, "zero": 0}}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_bugs_are_caught(plant: Any, ranks: int, sections: dict[str, Any]) -> None:
    run = config(**sections)
    curve = run_ranks(ranks, partial(engine_curve, steps=5, sabotage=plant), run)[0]
    loss, norm = worst(curve, expected(run)[:5])
    assert loss > LOSS or norm > NORM, f"{plant.__name__} went unseen"
