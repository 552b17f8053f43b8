"""What is counted, and that a kernel which is wrong is not timed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from megalm.nn.kernels import BACKENDS, Mask
from tests.benchmarks.scripts import script
from tests.distributed.ranks import run_ranks

gpu_attention = script("gpu_attention")
CPU = torch.device("cpu")


def measure(backend: str, packed: bool = False) -> dict[str, Any]:
    return gpu_attention.measure(backend, 64, 128, packed, tokens=256, device=CPU, repeats=2)


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_are_those_that_the_mask_shows(packed: bool) -> None:
    seen = gpu_attention.causal_mask(1, 320, packed, CPU).visible(320, 320, CPU)
    assert gpu_attention.visible_pairs(320, packed) == seen.sum().item()
    assert sum(gpu_attention.document_lengths(320)) == 320


def test_flops_of_a_pair_are_torchs() -> None:
    shape = (2, 4, 320, 64)
    forward, backward = sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape)
    pairs_and_channels = 2 * 4 * 320 * 320 * 64
    assert forward == gpu_attention.PASSES["forward"] * pairs_and_channels
    assert forward + backward == gpu_attention.PASSES["forward and backward"] * pairs_and_channels


@pytest.mark.parametrize("packed", [False, True])
def test_a_right_kernel_is_timed(packed: bool) -> None:
    row = measure("sdpa", packed)
    for name, flops in gpu_attention.PASSES.items():
        work = flops * 2 * 64 * 2 * gpu_attention.visible_pairs(128, packed)
        assert row[name]["tflops"] == pytest.approx(work / row[name]["seconds"] / 1e12)


def test_a_wrong_kernel_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = BACKENDS["sdpa"]

    def sees_other_documents(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return sdpa.run(q, k, v, Mask("causal"))

    monkeypatch.setitem(BACKENDS, "sdpa", replace(sdpa, run=sees_other_documents))
    assert list(measure("sdpa")) == list(gpu_attention.PASSES)
    row = measure("sdpa", packed=True)
    assert list(row) == ["wrong"] and row["wrong"].startswith("output is ")


def test_what_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure("flash2") == {"refused": "it does not run on cpu"}

    def unfit(*given: Any) -> Tensor:
        raise RuntimeError("no kernel for this shape\nat some place")

    monkeypatch.setitem(BACKENDS, "sdpa", replace(BACKENDS["sdpa"], run=unfit))
    assert measure("sdpa") == {"refused": "RuntimeError: no kernel for this shape"}


def whole_path(output: Path) -> int:
    import sys

    sys.argv = ["gpu_attention.py", "--device", "cpu", "--preset", "tiny", "--output", str(output)]
    return gpu_attention.main()


def test_the_whole_path_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert run_ranks(1, whole_path, output) == [0]
    rows = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert len(rows) == 2 * 2 * len(BACKENDS)
    assert all("refused" in row or row["forward"]["tflops"] > 0 for row in rows)
    assert {row["backend"] for row in rows if "forward" in row} == {"blocks", "sdpa", "plain"}
