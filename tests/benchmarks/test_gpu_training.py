"""What can be proved of the GPU benchmarks without a GPU: counts, predictions, and that the whole path runs."""

import gc
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalm.errors import MegalmError
from megalm.models.decoder import build_model, decoder
from megalm.nn.kernels import BACKENDS
from megalm.nn.layers import Layers
from megalm.nn.loss import head_loss
from megalm.training.loop import tensors
from megalm.training.memory import predict
from tests.benchmarks.scripts import script
from tests.distributed.ranks import run_ranks

gpu_measure, gpu_training = map(script, ("gpu_measure", "gpu_training"))

SMALL = ("model.num_layers=4", "model.vocab_size=2048", "train.sequence_length=128", "train.global_batch_size=4")
"""Of the tiny preset: large enough that a step's memory is mainly what is predicted."""


def test_flops_by_hand() -> None:
    """The tiny model: width 128, 4 heads of 32 over 2, inner width 256, 2 blocks, 512 ids, 64 tokens."""
    block = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 256
    matrices = 2 * block + 512 * 128
    found = gpu_measure.read_config("tiny", steps=1).flops_per_token()
    assert found["6n"] == 6 * matrices
    assert found["full"] == 6 * matrices + 12 * 2 * 4 * 32 * 64
    assert found["causal"] == 6 * matrices + 12 * 2 * 4 * 32 * 32


@pytest.mark.parametrize("change", ["model.num_layers=2", "model.num_layers=3", "train.sequence_length=96"])
def test_flops_are_those_that_torch_counts(change: str) -> None:
    """Of a forward and backward pass with the plain attention, which computes all pairs."""
    config = gpu_measure.read_config("tiny", "model.attention_backend=plain", change, steps=1)
    model = build_model(decoder(config.model, Layers(), seed=0, segmented=False), seed=0)
    with gpu_measure.synthetic_loader(config) as loader:
        inputs, targets = tensors(next(loader)[0][0])
    with FlopCounterMode(display=False) as counter:
        head_loss("language_model", Layers(), model(inputs), *targets).backward()
    assert counter.get_total_flops() == inputs[0].numel() * config.flops_per_token()["full"]


def test_made_up_text_is_the_same_each_time_and_has_documents() -> None:
    config = gpu_measure.read_config("tiny", "data.attend_across_documents=false", steps=1)
    first, again = (next(gpu_measure.synthetic_loader(config))[0] for _ in range(2))
    assert all((a.tokens == b.tokens).all() for a, b in zip(first, again, strict=True))
    batch = gpu_measure.Synthetic(config, document=20).batch([(0, 1)], torch.arange(1).numpy())
    # The window begins at token 64; documents at 80 and 100 of it.
    assert batch.segment_ids[0].tolist() == [0] * 16 + [1] * 20 + [2] * 20 + [3] * 8
    assert batch.positions[0, :18].tolist() == [*range(16), 0, 1]


def test_what_does_not_fit_is_made_smaller() -> None:
    whole = predict(gpu_measure.read_config("tiny", *SMALL, steps=1)).total
    name, changes = gpu_training.fit("tiny", list(SMALL), 1, whole)
    assert (name, changes[-3]) == ("tiny", "train.micro_batch_size=4")
    name, changes = gpu_training.fit("tiny", list(SMALL), 1, whole - 1)
    assert (name, changes[-3]) == ("tiny", "train.micro_batch_size=2")
    one_row = predict(gpu_measure.read_config("tiny", *SMALL, "train.micro_batch_size=1", steps=1)).total
    name, changes = gpu_training.fit("tiny", list(SMALL), 1, one_row - 1)
    assert (name, changes[-2]) == ("tiny, 3 of 4 blocks", "model.num_layers=3")
    with pytest.raises(MegalmError, match="more than 0 MiB with one row"):
        gpu_training.fit("tiny", list(SMALL), 1, 1000)


def test_the_ladder_names_every_lever() -> None:
    base = gpu_measure.read_config("tiny", steps=1)
    rungs = gpu_training.ladder(base, "sdpa")
    tried = {name.removeprefix("attention ") for name in rungs if name.startswith("attention ")}
    assert BACKENDS.keys() - tried == {"sdpa"}, "the base's own"
    for rung, changes in rungs.items():
        assert gpu_measure.read_config("tiny", *changes, steps=1) != base, rung


def test_a_rung_that_trains_another_model_is_wrong() -> None:
    assert gpu_training.fault([6.2, 6.1], off=None) == ""
    assert gpu_training.fault([6.2, 6.1], off=0.002) == ""
    assert "up to 1.6% from the base's" in gpu_training.fault([6.2, 6.1], off=0.016)
    assert "from the base's" in gpu_training.fault([6.2, 6.1], off=float("nan"))
    assert "does not fall" in gpu_training.fault([6.2, 6.2], off=0.0)
    assert "does not fall" in gpu_training.fault([float("nan")] * 2, off=None)


def test_losses_are_compared_at_every_step() -> None:
    assert gpu_training.difference([6.0, 5.0, 4.0], [6.0, 5.0, 4.0]) == 0
    assert gpu_training.difference([6.0, 5.1, 4.0], [6.0, 5.0, 4.0]) == pytest.approx(0.02)
    assert gpu_training.difference([6.0, 5.0, 3.0], [6.0, 5.0, 4.0]) == pytest.approx(0.25)
    with pytest.raises(ValueError):
        gpu_training.difference([6.0], [6.0, 5.0])


def rungs(until: float, output: Path) -> tuple[int, int]:
    """On a rank: the whole path of a worker; rungs that were wrong, and engines that are still there."""
    from deepspeed import DeepSpeedEngine

    wrong = gpu_training.work(
        Namespace(device="cpu", output=output, worker="tiny", set=[], rung=["base", "full", "apex", "fp32"], steps=2,
                  warmup=1, until=until, profile=True)
    )  # fmt: skip
    gc.collect()
    return wrong, sum(isinstance(each, DeepSpeedEngine) for each in gc.get_objects())


def test_a_ladder_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert run_ranks(1, rungs, float("inf"), output) == [(0, 0)]
    facts, base, apex, full, fp32 = [json.loads(line) for line in output.read_text().splitlines()]
    assert facts["torch"] == torch.__version__
    assert [base["rung"], apex["rung"], full["rung"]] == ["base", "norm apex, not compiled", "recompute full"]
    assert fp32["rung"] == "fp32"
    assert "apex" in apex["refused"] and "tokens_per_second" not in apex
    for row in (base, full, fp32):
        assert len(row["losses"]) == 4 and len(row["step_seconds"]) == 2, "the profiled step is not timed"
        assert row["profile"] == {"span": 0.0, "busy": 0.0, "kernels": {}}, "a CPU has no kernels"
        assert row["tokens_per_second"] == row["tokens_per_step"] / row["seconds"]
        assert row["peak_memory"] is None and row["mfu_full"] is None, "a CPU has neither"
    for row in (base, full):
        assert row["predicted_total"] == sum(row["predicted_memory"].values())
    assert fp32["predicted_total"] is None, "only bf16's memory is predicted"
    assert base["loss_difference"] == 0
    assert full["loss_difference"] == gpu_training.difference(full["losses"], base["losses"]) < 1e-3
    assert 0 < fp32["loss_difference"] < 1e-3
    assert "parallel.recompute=full" in full["settings"]
    assert full["predicted_total"] < base["predicted_total"]


def test_kernels_that_run_side_by_side_are_busy_once() -> None:
    """Two streams, and a gap of 30."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, start: int, duration: int, device: Any = cuda, note: bool = False) -> Any:
        told = {"name": name, "start_ns": start, "duration_ns": duration, "device_type": device,
                "is_user_annotation": note}  # fmt: skip
        return SimpleNamespace(**{key: lambda value=value: value for key, value in told.items()})

    events = [event("a", 100, 50), event("b", 120, 60), event("a", 210, 10), event("launch", 0, 500, cpu),
              event("step", 0, 500, note=True)]  # fmt: skip
    results = SimpleNamespace(events=lambda: events)
    found = gpu_training.by_kernel(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    assert found["span"] == pytest.approx(120e-9) and found["busy"] == pytest.approx(90e-9)
    assert found["kernels"] == {"a": {"seconds": pytest.approx(60e-9), "calls": 2},
                                "b": {"seconds": pytest.approx(60e-9), "calls": 1}}  # fmt: skip


def test_nothing_starts_after_the_time_is_over(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    run_ranks(1, rungs, 1.0, output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["skipped"] for row in rows[1:]] == ["--minutes are over"] * 4
