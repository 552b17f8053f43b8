"""Which parameters a run trains and how fast, by name; patterns that mean nothing are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from megalm.errors import MegalmError
from megalm.models.config import ModelConfig, TuningConfig
from megalm.models.tuning import check, is_trained, rate_scale, shapes

MODEL = ModelConfig(hidden_size=16, num_attention_heads=4, num_layers=3, vocab_size=50)


def trained(**keys: Any) -> set[str]:
    tuning = TuningConfig(**keys)
    names = shapes(MODEL, tuning)
    check(names, tuning, tied=False)
    return {name for name in names if is_trained(name, tuning)}


def test_full_trains_all_but_what_is_frozen() -> None:
    everything = trained()
    assert len(everything) == 3 + 3 * 9
    left = trained(freeze=["embedding.*", "blocks.[0-1].*"])
    assert left == {name for name in everything if name.startswith(("blocks.2.", "norm.", "head."))}


def test_lora_trains_adapters_and_what_is_named() -> None:
    names = trained(method="lora", targets=["query", "blocks.1.*.down"], also_train=["*norm.weight"])
    adapters = {name.rpartition(".")[0] for name in names if "lora_" in name}
    assert adapters == {f"blocks.{i}.attention.query" for i in range(3)} | {"blocks.1.feed_forward.down"}
    assert {name for name in names if "lora_" not in name} == {"norm.norm.weight"} | {
        f"blocks.{i}.{norm}.weight" for i in range(3) for norm in ("attention_norm", "feed_forward_norm")
    }
    assert not any("blocks.0" in name for name in trained(method="dora", freeze=["blocks.0.*"]))


def test_rates_fall_from_the_head_to_the_embedding() -> None:
    tuning = TuningConfig(layer_decay=0.5, body_rate=0.1)
    scale = {name: rate_scale(name, tuning, 3) for name in (*shapes(MODEL, tuning), "classifier.weight")}
    assert scale["classifier.weight"] == 1.0
    assert scale["norm.norm.weight"] == scale["head.weight"] == pytest.approx(0.1)
    assert [scale[f"blocks.{i}.attention.query.weight"] for i in (2, 1, 0)] == pytest.approx([0.05, 0.025, 0.0125])
    assert scale["embedding.table.weight"] == pytest.approx(0.1 * 0.5**4)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"freeze": ["embeding.*"]}, r"tuning.freeze: embeding.\* matches nothing .* names are embedding.table.weight"),
        ({"method": "lora", "also_train": ["norm"]}, "tuning.also_train: norm matches nothing in this model; .*norm"),
        ({"method": "lora", "targets": ["q_proj"]}, r"tuning.targets: q_proj matches .* are blocks.\d.attention"),
        ({"head_first_steps": 5}, "tuning.head_first_steps is 5 and the model has no task head"),
        ({"body_rate": 0.1}, "tuning.body_rate is 0.1 and the model has no task head"),
        ({"freeze": ["*"]}, "names every parameter"),
    ],
)
def test_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MegalmError, match=sentence):
        trained(**keys)


def test_keys_that_do_not_go_together() -> None:
    with pytest.raises(ValidationError, match="also_train needs method lora or dora"):
        TuningConfig(also_train=["head.*"])
    with pytest.raises(ValidationError, match="targets is empty"):
        TuningConfig(method="lora", targets=[])
