"""DeepSpeed's JSON: what each of megalm's choices becomes, and who owns which key."""

import os
from typing import Any

import pytest
import torch

from megalm.parallel.config import ParallelConfig
from megalm.parallel.deepspeed_config import OWNED, REFUSED, check_pass_through, derive
from tests.distributed.ranks import run_ranks


def derived(precision: str = "fp32", extra: dict[str, Any] | None = None, **parallel: Any) -> dict[str, Any]:
    return derive(
        ParallelConfig(**parallel),
        precision=precision,
        micro_batch_size=2,
        accumulation=4,
        data_parallel=8,
        gradient_clipping=1.5,
        largest_bucket=1000,
        extra=extra or {},
    )


def test_batch_and_clipping() -> None:
    config = derived()
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 64
    assert config["gradient_clipping"] == 1.5
    assert derived(zero=0)["gradient_clipping"] == 0.0, "with ZeRO 0 the engine clips, by its own norm"


def test_each_precision_accumulates_in_fp32() -> None:
    fp32, bf16, fp16 = derived("fp32"), derived("bf16"), derived("fp16")
    assert not {"bf16", "fp16", "data_types"} & set(fp32)
    assert bf16["bf16"]["enabled"] and "fp16" not in bf16
    assert fp16["fp16"]["enabled"] and fp16["fp16"]["loss_scale"] == 0 and "bf16" not in fp16
    for half in (bf16, fp16):
        assert half["data_types"] == {"grad_accum_dtype": "fp32"}
        assert half["communication_data_type"] == "fp32"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero(stage: int) -> None:
    zero = derived(zero=stage)["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1000, "no bucket above the model"
    assert "offload_optimizer" not in zero


def test_offload() -> None:
    config = derived(zero=2, offload_optimizer=True)
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed's own Adam is one choice of several"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_takes_it(precision: str) -> None:
    """Its own reader of the JSON finds our numbers consistent."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.config import DeepSpeedConfig

    config = derived(precision, {"fp16": {"loss_scale_window": 500}} if precision == "fp16" else None)
    theirs = DeepSpeedConfig(config | {"train_batch_size": 8})  # one rank here, not eight
    assert theirs.train_micro_batch_size_per_gpu == 2 and theirs.gradient_accumulation_steps == 4
    assert theirs.float16_config.enabled == (precision == "fp16")
    assert theirs.bfloat16_config.enabled == (precision == "bf16")
    if precision == "fp16":
        assert theirs.float16_config.loss_scale_window == 500


def test_the_pass_through_is_merged_into_ours() -> None:
    extra = {
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 77},
        "fp16": {"loss_scale_window": 500},
        "comms_logger": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    config = derived("fp16", extra)
    assert config["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 77,
        "allgather_bucket_size": 1000,
        "overlap_comm": True,
    }
    assert config["fp16"]["enabled"] and config["fp16"]["loss_scale_window"] == 500
    assert config["comms_logger"] == {"enabled": True} and config["wall_clock_breakdown"] is True
    assert extra["zero_optimization"] == {"overlap_comm": True, "reduce_bucket_size": 77}, "the config is frozen"


@pytest.mark.parametrize("key", OWNED)
def test_owned_keys_are_refused_wherever_they_are_nested(key: str) -> None:
    extra: Any = 1
    for part in reversed(key.split(".")):
        extra = {part: extra}
    for check in (check_pass_through, lambda extra: derived("fp16", extra)):
        with pytest.raises(ValueError, match=rf"^deepspeed\.{key} is decided by megalm: set {OWNED[key]} instead$"):
            check(extra)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_do_not_work_are_refused_with_the_reason(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ValueError, match=rf"^deepspeed\.{key} cannot be used \({REFUSED[key]}\): leave it out$"):
        check_pass_through({section: {name: 2}})


@pytest.mark.parametrize("value", [3, None, True, "auto"])
def test_a_section_that_holds_owned_keys_is_not_replaced_whole(value: Any) -> None:
    with pytest.raises(ValueError, match=r"deepspeed\.zero_optimization is a mapping of keys.* than zero_opt.*stage"):
        check_pass_through({"zero_optimization": value})
    owned = r"fp16\.enabled, fp16\.fp16_master_weights_and_grads"
    with pytest.raises(ValueError, match=rf"deepspeed\.fp16 is a mapping .* than {owned}, which megalm decides"):
        check_pass_through({"fp16": value})


@pytest.mark.parametrize("key", sorted({key.rpartition(".")[0] for key in OWNED if "." in key}))
def test_the_other_keys_beside_an_owned_one_are_free(key: str) -> None:
    check_pass_through({key: {"some_other_key": 1}})


def _said(extra: dict[str, Any]) -> str:
    """On a rank: the sentence in which such a config is refused."""
    from megalm.errors import MegalmError
    from megalm.training.build import build_engine
    from tests.distributed.training import config, join

    run = config(deepspeed=extra, parallel={"pipeline": 2})
    try:
        build_engine(run, join(run), torch.device("cpu"), lambda norm: True)
    except MegalmError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"gradient_cliping": 0.1}, "DeepSpeed has no key gradient_cliping, but gradient_clipping: correct it"),
        ({"zero_optimization": {"overlap_com": True}}, "DeepSpeedZeroConfig: overlap_com: Extra inputs are not"),
        ({"wall_clock_breakdown": "perhaps"}, "DeepSpeed does not read its config ("),
        ({"wall_clock_breakdown": False, "flops_profiler": {"enabled": False}, "aio": {"block_size": 4096}}, ""),
    ],
)
def test_what_deepspeed_does_not_know_is_refused_on_every_rank(extra: dict[str, Any], said: str) -> None:
    first, second = run_ranks(2, _said, extra)
    assert first == second and first.startswith(said) and bool(first) == bool(said)
