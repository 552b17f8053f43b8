"""One CUDA device: a run trains, resumes and comes back from its checkpoint (kernels: test_kernels.py)."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megalm.eval.load import load_model
from megalm.nn.kernels import BACKENDS
from megalm.optim.adamw import resolve_implementation
from tests.training.runs import curve

pytestmark = pytest.mark.gpu

Settings = Callable[..., dict[str, Any]]
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def train(tree: dict[str, Any], folder: Path, *arguments: str) -> str:
    """The command, as a user runs it; what it printed."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    # The tests have chosen the CPU for DeepSpeed in this process.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    ended = subprocess.run(
        [sys.executable, "megalm/train.py", "--config", path, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return ended.stdout


def on_gpu(settings: Settings, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    tree = settings(name, **{key: value for key, value in sections.items() if key != "train"})
    tree["run"] |= {"device": "cuda"}
    tree["model"] |= {"hidden_size": 128, "attention_backend": "plain"} | sections.get("model", {})
    tree["train"] |= {"compile": False} | sections.get("train", {})
    return tree


@pytest.mark.parametrize(
    ("precision", "zero"), [("fp32", 0), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 1)]
)
def test_a_run_resumes_bitwise(settings: Settings, tmp_path: Path, precision: str, zero: int) -> None:
    """Bitwise, with the plain attention: every kernel of the run then adds in a fixed order."""
    sections = {"parallel": {"zero": zero}, "train": {"precision": precision}}
    whole, resumed = (on_gpu(settings, name, **sections) for name in ("whole", "resumed"))
    said = train(whole, tmp_path)
    assert torch.cuda.get_device_name(0) in said
    expected = curve(whole)
    assert len(expected) == 8 and all(math.isfinite(record["loss"]) for record in expected)
    assert expected[-1]["held_out"]["held_out"] < expected[0]["loss"]
    said = train(resumed, tmp_path, "--resume", str(tmp_path / "whole" / "checkpoints" / "step-4"))
    assert "continuing from step 4 of 8" in said
    found = curve(resumed)
    assert found == expected[4:]
    assert [record["loss"] for record in found] != [record["loss"] for record in expected[3:7]]


def test_the_fastest_attention_trains_the_same_model(settings: Settings, tmp_path: Path) -> None:
    """Flash kernels add gradients in no fixed order, so runs are equal to rounding only: 1 % of the loss in bf16."""
    curves = {}
    for backend in ("plain", "auto"):
        tree = on_gpu(settings, backend, train={"precision": "bf16"}, model={"attention_backend": backend})
        train(tree, tmp_path)
        curves[backend] = [record["loss"] for record in curve(tree)]
    assert curves["auto"] == pytest.approx(curves["plain"], rel=1e-2)


def test_what_is_fast_trains_the_same_model(settings: Settings, tmp_path: Path) -> None:
    """train.compile auto, the kernels that auto takes, float8 and recomputation to fit, and fp32: 1 % of the loss of a
    plain run in bf16."""
    kernels = {"attention_backend": "auto"}
    kinds: dict[str, dict[str, dict[str, Any]]] = {
        "plain": {},
        "fp32": {"train": {"precision": "fp32"}},
        "quick": {"train": {"compile": "auto"}, "model": kernels},
        "again": {"train": {"compile": "auto"}, "model": kernels, "parallel": {"recompute": "selective"}},
        "fp8": {"train": {"compile": "auto", "fp8": True}, "model": kernels, "parallel": {"recompute": "auto"}},
    }
    curves, said = {}, {}
    for name, sections in kinds.items():
        changed = {key: sections.get(key, {}) for key in ("model", "train", "parallel")}
        changed["train"] = {"precision": "bf16"} | changed["train"]
        changed["parallel"] = {"zero": 1} | changed["parallel"]
        tree = on_gpu(settings, name, **changed)
        said[name] = train(tree, tmp_path)
        curves[name] = [record["loss"] for record in curve(tree)]
    for name, words in said.items():
        is_quick = name not in ("plain", "fp32")
        line = re.search(r"^attention +(\S+?)(, compiled)?(;|$)", words, re.MULTILINE)
        assert line, words
        assert bool(line[2]) == (is_quick and BACKENDS[line[1]].traceable), words
        assert ("; measured" in words) == is_quick, words
    assert "bf16 and fp8" in said["fp8"] and "predicted at the peak of a step" in said["fp8"]
    assert "at the peak" in said["plain"], "what was predicted is held against what was taken"
    for name in kinds.keys() - {"plain"}:
        assert curves[name] == pytest.approx(curves["plain"], rel=1e-2)
        assert curves[name] != curves["plain"]


def test_a_gpu_follows_a_cpu(settings: Settings, tmp_path: Path) -> None:
    """In fp32; the losses of 8 steps within 1e-4, as between layouts."""
    gpu, cpu = on_gpu(settings, "gpu"), on_gpu(settings, "cpu")
    cpu["run"]["device"] = "cpu"
    for tree in (gpu, cpu):
        train(tree, tmp_path)
    for ours, theirs in zip(curve(gpu), curve(cpu), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    rates = curve(gpu)[-1]
    assert rates["tflops"] >= rates["tflops_causal"] > 0, "both conventions are reported on a GPU"


def test_a_checkpoint_has_the_same_logits_on_both_devices(settings: Settings, tmp_path: Path) -> None:
    tree = on_gpu(settings, "run", train={"precision": "bf16"})
    train(tree, tmp_path)
    tokens = torch.arange(64).remainder(600)[None]
    place = torch.arange(64)[None]

    def logits(device: str, dtype: torch.dtype) -> Tensor:
        model, config, _ = load_model(tmp_path / "run", device=device, dtype=dtype)
        stream = (tokens, torch.zeros_like(tokens), place, torch.zeros(1, dtype=torch.long))
        with torch.no_grad():
            out = model(tuple(part.to(device) for part in stream))
        assert config.vocab_size == 600
        return out[:, :600].double().cpu()

    reference = logits("cpu", torch.float32)
    scale = reference.abs().max()
    assert (logits("cuda", torch.float32) - reference).abs().max() < 1e-4 * scale
    half = (logits("cuda", torch.bfloat16) - reference).abs().max()
    assert 1e-4 * scale < half < 0.05 * scale, "bf16 is close, and the comparison can tell"


@pytest.mark.parametrize("offload", [False, True])
def test_auto_finds_an_optimizer_that_equals_plain_adamw(offload: bool) -> None:
    """resolve_implementation compares what it takes with plain torch."""
    assert resolve_implementation("auto", "cuda", offload) in ("apex", "deepspeed", "torch_fused")
