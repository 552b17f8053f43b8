"""What is proved is looked up by what a config does, and what is not is named with the nearest that is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.config import load
from megalm.layout import Layout
from megalm.parallel.proved import AXES, FEATURES, Proved, features, pair_names, proved, signature, signature_name
from megalm.training.config import RunConfig
from tests.distributed.training import config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TWO = Layout(data=2)


def told(run: RunConfig, layout: Layout = TWO) -> Proved:
    """A matrix in which this config alone was tried."""
    ours = signature(run, layout, 4)
    return Proved(frozenset([signature_name(ours)]), frozenset(pair_names(ours, features(run, layout))))


def test_a_config_that_was_tried_is_proved_at_any_degree() -> None:
    run = config()
    assert told(run).problem(run, TWO, 4) is None
    assert told(run).problem(run, Layout(data=512), 64) is None


@pytest.mark.parametrize(
    ("sections", "layout", "accumulation", "sentence"),
    [
        (
            {"parallel": {"zero": 2}},
            TWO,
            4,
            "parallel.zero 2, .* is not proved to train .* (it is with parallel.zero 1)",
        ),
        ({}, Layout(), 4, "data-parallel ranks 1, .* (it is with data-parallel ranks >1)"),
        ({}, TWO, 1, "micro-batches per step 1 is not proved .* (it is with micro-batches per step >1)"),
        ({"train": {"precision": "bf16"}}, TWO, 4, "train.precision bf16, .* (it is with train.precision fp32)"),
        ({"parallel": {"recompute": "full"}}, TWO, 4, "(it is with parallel.recompute none)"),
        ({"parallel": {"offload_optimizer": True}}, TWO, 4, "(it is with parallel.offload_optimizer off)"),
        (
            {"parallel": {"tensor": 2, "sequence_parallel": True}},
            Layout(data=2, tensor=2),
            4,
            "parallel.tensor >1 with sequence_parallel, .* (it is with parallel.tensor 1)",
        ),
        (
            {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"}},
            Layout(data=2, pipeline=2),
            4,
            "parallel.pipeline dualpipev, .* (it is with parallel.pipeline 1)",
        ),
    ],
)
def test_another_signature_is_not_proved(
    sections: dict[str, Any], layout: Layout, accumulation: int, sentence: str
) -> None:
    problem = told(config()).problem(config(**sections), layout, accumulation)
    assert problem is not None
    for part in sentence.split(" .* "):
        assert part in problem


@pytest.mark.parametrize(
    ("sections", "feature"),
    [
        ({"model": {"position": "alibi"}}, "model.position (alibi)"),
        ({"model": {"rope_scaling": {"kind": "linear", "factor": 2}}}, "model.rope_scaling.kind (linear)"),
        ({"model": {"norm": "layernorm"}}, "model.norm (layernorm)"),
        ({"model": {"activation": "relu"}}, "model.activation (relu)"),
        ({"model": {"num_key_value_heads": 4}}, "model.num_key_value_heads (one per query head)"),
        ({"model": {"head_dim": 4}}, "model.head_dim (set)"),
        ({"model": {"qk_norm": True}}, "model.qk_norm (on)"),
        ({"model": {"sliding_window": 5}}, "model.sliding_window (on)"),
        ({"model": {"attention_bias": True}}, "model.attention_bias (on)"),
        ({"model": {"attention_output_bias": True}}, "model.attention_output_bias (on)"),
        ({"model": {"mlp_bias": True}}, "model.mlp_bias (on)"),
        ({"model": {"hidden_dropout": 0.1}}, "model.hidden_dropout (on)"),
        ({"model": {"attention_dropout": 0.1}}, "model.attention_dropout (on)"),
        ({"model": {"vocab_size": 104}}, "model.vocab_size (whole)"),
        ({"model": {"tie_word_embeddings": True}}, "model.tie_word_embeddings (on)"),
        ({"model": {"z_loss": 1e-3}}, "model.z_loss (on)"),
        ({"data": {"attend_across_documents": False}}, "data.attend_across_documents (apart)"),
        ({"optimizer": {"gradient_clipping": 0.0}}, "optimizer.gradient_clipping (off)"),
    ],
)
def test_another_feature_is_not_proved(sections: dict[str, Any], feature: str) -> None:
    problem = told(config()).problem(config(**sections), TWO, 4)
    assert problem is not None and problem.startswith(f"{feature} with parallel.tensor 1 is not proved"), problem


def test_features_that_depend_on_the_layout() -> None:
    run = config(model={"num_layers": 5})
    assert features(run, Layout())["stages"] == "even" and features(run, Layout(pipeline=2))["stages"] == "uneven"
    assert features(run, Layout(tensor=2))["key_value_heads"] == "fewer"
    assert features(run, Layout(tensor=4))["key_value_heads"] == "fewer than tensor ranks"


def test_a_feature_that_is_proved_elsewhere_says_where() -> None:
    run = config(model={"qk_norm": True})
    known = told(config())
    elsewhere = pair_names(signature(run, Layout(tensor=2), 4), features(run, Layout(tensor=2)))
    tensor = signature_name(signature(config(), Layout(data=2, tensor=2), 4))
    known = replace(known, signatures=known.signatures | {tensor}, pairs=known.pairs | set(elsewhere))
    assert known.problem(run, TWO, 4) == (
        "model.qk_norm (on) with parallel.tensor 1 is not proved to train the model that one process trains "
        "(it is with parallel.tensor >1)"
    )


def test_every_axis_and_feature_has_a_key() -> None:
    assert set(signature(config(), TWO, 1)) == set(AXES)
    assert set(features(config(), TWO)) == set(FEATURES)


@pytest.mark.parametrize("path", ["demo.yaml", "tiny.yaml", *(f"run/{p.name}" for p in (CONFIGS / "run").glob("*"))])
def test_shipped_configs_are_proved(path: str) -> None:
    run = load(str(CONFIGS / path), RunConfig)
    model = run.model.model_copy(update={"vocab_size": run.model.vocab_size or 4096})
    run = run.model_copy(update={"model": model})
    for data in (1, 64):
        layout = Layout(pipeline=run.parallel.pipeline, data=data, tensor=run.parallel.tensor)
        for accumulation in (1, 8):
            assert proved().problem(run, layout, accumulation) is None
