"""Norms against their formulas in fp64, and the choice of implementation."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.errors import MegalmError
from megalm.nn import norm
from megalm.nn.layers import Layers
from megalm.nn.norm import LayerNorm, RMSNorm

EPS = 1e-3


def formula(kind: type, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if kind is LayerNorm:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + (0 if bias is None else bias)


def difference(kind: type, dtype: torch.dtype, shape: tuple[int, ...], eps: float = EPS) -> float:
    """Of output and gradients from the formula in fp64, relative to the largest entry of each."""
    draw = torch.Generator().manual_seed(0)
    module = kind(shape[-1], EPS, "auto", Layers().replicated)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=draw)
    module.to(dtype)
    x = (torch.randn(shape, generator=draw) * 0.1 + 0.05).to(dtype).requires_grad_()
    seed = torch.randn(shape, generator=draw).to(dtype)
    mine = [module(x)]
    mine += torch.autograd.grad(mine[0], [x, *module.parameters()], seed)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, *module.parameters())]
    reference = [formula(kind, leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, eps)]
    reference += torch.autograd.grad(reference[0], leaves, seed.double())
    assert mine[0].dtype == dtype
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, reference, strict=True))


@pytest.mark.parametrize("shape", [(10, 16), (2, 5, 3, 16)])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_equals_the_formula(kind: type, shape: tuple[int, ...]) -> None:
    assert difference(kind, torch.float32, shape) < 3e-6
    assert difference(kind, torch.bfloat16, shape) < 1e-2


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_comparison_catches_another_epsilon(kind: type) -> None:
    assert difference(kind, torch.float32, (10, 16), eps=1.1 * EPS) > 1e-4


@pytest.fixture(autouse=True)
def _forget_apex():
    norm.apex_kernels.cache_clear()
    yield
    norm.apex_kernels.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def _apex(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")


def test_auto_is_torch_where_there_is_no_gpu_or_no_apex() -> None:
    assert norm.apex_kernels("auto", "cpu") is None
    assert norm.apex_kernels("torch", "cuda") is None
    assert norm.apex_kernels("auto", "cuda") is None


def test_missing_apex_is_refused() -> None:
    with pytest.raises(MegalmError, match="model.norm_implementation is apex, but apex is not installed"):
        norm.apex_kernels("apex", "cuda")


def test_the_unrelated_apex_of_pypi_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _apex(tmp_path, "apex/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MegalmError, match="is not NVIDIA's"):
        norm.apex_kernels("apex", "cuda")
    norm.apex_kernels.cache_clear()
    assert norm.apex_kernels("auto", "cuda") is None


NVIDIAS = (
    "apex/__init__.py",
    "apex/optimizers/__init__.py",
    "apex/normalization/__init__.py",
    "apex/normalization/fused_layer_norm.py",
)


def test_apex_without_its_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _apex(tmp_path, *NVIDIAS)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MegalmError, match="does not import .*fused_layer_norm_cuda"):
        norm.apex_kernels("apex", "cuda")


def test_auto_takes_apex_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If it computes rightly: the self-check stands in for the GPU."""
    _apex(tmp_path, *NVIDIAS, "fused_layer_norm_cuda.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(norm, "_self_check", lambda kernels, device: None)
    kernels = norm.apex_kernels("auto", "cuda")
    assert kernels is not None and kernels.__name__ == "apex.normalization.fused_layer_norm"
    assert norm.resolve_norm("auto", "cuda") == norm.resolve_norm("apex", "cuda") == "apex"
    assert norm.resolve_norm("auto", "cpu") == norm.resolve_norm("torch", "cuda") == "torch"
    with pytest.raises(MegalmError, match="needs a GPU"):
        norm.resolve_norm("apex", "cpu")
    norm.apex_kernels.cache_clear()
    monkeypatch.setattr(norm, "_self_check", lambda kernels, device: "its norms fail")
    assert norm.resolve_norm("auto", "cuda") == "torch"
    assert "auto passes over apex: its norms fail" in caplog.text
    with pytest.raises(MegalmError, match="model.norm_implementation is apex, but its norms fail: .*set .* to auto"):
        norm.resolve_norm("apex", "cuda")


def stand_in(rms_scale: float = 1.0, layer_gradient: float = 1.0) -> types.ModuleType:
    """apex's interface over torch, with planted mistakes."""
    fake = types.ModuleType("fused_layer_norm")

    def fused_rms_norm_affine(x: Tensor, weight: Tensor, shape: torch.Size, eps: float) -> Tensor:
        return F.rms_norm(x, shape, weight, eps) * rms_scale

    def fused_layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, shape: torch.Size, eps: float) -> Tensor:
        return F.layer_norm(x, shape, weight, bias.detach() + (bias - bias.detach()) * layer_gradient, eps)

    fake.fused_rms_norm_affine, fake.fused_layer_norm_affine = fused_rms_norm_affine, fused_layer_norm_affine
    return fake


def test_self_check_passes_right_norms_and_fails_wrong_ones() -> None:
    with torch.inference_mode():
        assert norm._self_check(stand_in(), "cpu") is None
    assert "from torch's" in (norm._self_check(stand_in(rms_scale=1.03), "cpu") or "")
    assert "from torch's" in (norm._self_check(stand_in(layer_gradient=0.97), "cpu") or "")
    assert "fused_rms_norm_affine" in (norm._self_check(types.ModuleType("old"), "cpu") or "")
