"""train.fp8: products of float8 where they are asked for, and a curve beside bf16's."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megalm.errors import MegalmError
from megalm.nn import float8
from megalm.training.config import RunConfig
from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, engine_curve

pytest.importorskip("torchao")
STEPS = 12
CPU = torch.device("cpu")


def run(fp8: bool = True, **sections: dict[str, Any]) -> RunConfig:
    own = {"fp8": fp8, "precision": "bf16", "micro_batch_size": 4} | sections.get("train", {})
    return config(**(sections | {"train": own, "parallel": {"zero": 1} | sections.get("parallel", {})}))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in fp64 as a number of `dtype` over the power of two that takes the largest nearest to the end of its range."""
    scale = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / x.double().abs().max().item()))
    return (x.double() * scale).to(torch.float32).to(dtype).double() / scale


def test_products_are_those_of_rounded_numbers() -> None:
    """torch's own float8 numbers, multiplied in fp64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    weight, bias = model[0].weight, model[0].bias
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    seed = torch.randn(32, 48, dtype=torch.bfloat16)
    float8.convert(model, CPU)
    assert model[0].weight is weight and model[0].bias is bias
    out = model(x)
    out.backward(seed)
    x8, w8 = (rounded(each.detach(), torch.float8_e4m3fn) for each in (x, weight))
    g8 = rounded(seed, torch.float8_e5m2)
    expected = {"out": x8 @ w8.T + bias.double(), "dx": g8 @ w8, "dw": g8.T @ x8}
    plain = {"out": x.double() @ weight.double().T + bias.double(), "dx": seed.double() @ weight.double(),
             "dw": seed.double().T @ x.double()}  # fmt: skip
    for name, ours in {"out": out, "dx": x.grad, "dw": weight.grad}.items():
        assert ours is not None and ours.dtype == torch.bfloat16

        def distance(reference: Tensor, ours: Tensor = ours) -> float:
            return ((ours.double() - reference).norm() / reference.norm()).item()

        assert distance(expected[name]) < 5e-3, name
        assert distance(plain[name]) > 2e-2, f"{name} is not of float8"


Curve = list[tuple[float, float]]


def difference(ours: Curve, plain: Curve) -> str | None:
    """The first loss or gradient norm that is further from bf16's than float8 takes it; it takes them by 1e-4 and 5e-3
    at most."""
    for step, (now, then) in enumerate(zip(ours, plain, strict=True)):
        for name, x, y, share in zip(("loss", "gradient norm"), now, then, (5e-4, 2e-2)):
            if not abs(x - y) <= share * abs(y):
                return f"step {step}: {name} is {x}, of bf16 {y}"
    return None


@pytest.mark.parametrize(
    ("compile", "recompute"),
    [(False, "none"), (True, "none"), (True, "selective"), (True, "full")],
    ids=["plain", "compiled", "compiled, selective recomputation", "compiled, full recomputation"],
)
def test_the_curve_stays_near_that_of_bf16(compile: bool, recompute: str) -> None:
    [ours] = run_ranks(1, engine_curve, run(train={"compile": compile}, parallel={"recompute": recompute}), STEPS)
    [plain] = run_ranks(1, engine_curve, run(fp8=False), STEPS)
    assert ours != plain, "nothing was computed in float8"
    assert plain[-1][0] < 0.9 * plain[0][0], "too short to tell"
    assert not (found := difference(ours, plain)), found


@pytest.mark.parametrize("zero", [1, 2])
def test_ranks_share_the_work(zero: int) -> None:
    sections: dict[str, Any] = {"parallel": {"zero": zero}}
    first, second = run_ranks(2, engine_curve, run(**sections), 4)
    [alone] = run_ranks(1, engine_curve, run(**sections), 4)
    assert first == second
    for (loss, norm), (loss_alone, norm_alone) in zip(first, alone, strict=True):
        assert loss == pytest.approx(loss_alone, rel=5e-5) and norm == pytest.approx(norm_alone, rel=1.5e-3)


def forget_a_scale() -> None:
    """A bug within: what a layer multiplies comes out a little too large."""
    plain = float8.convert

    def convert(module: nn.Module, device: torch.device) -> None:
        plain(module, device)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda layer, inputs, out: out * 1.05)

    float8.convert = convert


def test_a_planted_bug_is_seen() -> None:
    [wrong] = run_ranks(1, engine_curve, run(), STEPS, forget_a_scale)
    [plain] = run_ranks(1, engine_curve, run(fp8=False), STEPS)
    assert difference(wrong, plain)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"parallel": {"tensor": 2}}, "parallel.tensor 2"),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline 2"),
        ({"parallel": {"zero": 3}}, "parallel.zero 3"),
        ({"train": {"precision": "fp32"}}, "train.precision fp32"),
        ({"tuning": {"method": "lora"}}, "tuning.method lora"),
        ({"task": {"kind": "chat", "arrangement": "sorted"}}, "rows of several lengths"),
        ({"model": {"intermediate_size": 72}}, r"model.intermediate_size 72 \(no multiple of 16\)"),
    ],
)
def test_what_is_not_proved_is_refused(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=f"train.fp8 is not proved with {why}"):
        run(**sections)


def test_a_missing_torchao_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'torchao'")

    monkeypatch.setattr(float8, "_torchao", missing)
    with pytest.raises(MegalmError, match=r"No module named 'torchao'.*pip install 'megalm\[fp8\]'"):
        float8.require(CPU)
