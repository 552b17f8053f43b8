"""Norms against their formulas in fp64, and the choice of implementation."""

import sys
import types

import pytest
import torch
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
    find = norm.find_apex
    find.cache_clear()
    yield
    find.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_auto_is_torch_on_a_cpu() -> None:
    assert norm.apex_kernels("auto", torch.zeros(1)) is None
    assert norm.apex_kernels("torch", torch.zeros(1)) is None


def test_missing_apex_is_refused() -> None:
    with pytest.raises(MegalmError, match="apex is not installed.*norm_implementation to torch"):
        norm.apex_kernels("apex", torch.zeros(1))


def test_the_unrelated_apex_of_pypi_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MegalmError, match="not NVIDIA's.*unrelated"):
        norm.apex_kernels("apex", torch.zeros(1))


def test_apex_without_its_kernels_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex" / "normalization").mkdir(parents=True)
    for file in ("__init__.py", "normalization/__init__.py", "normalization/fused_layer_norm.py"):
        (tmp_path / "apex" / file).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MegalmError, match="lacks its fused norms"):
        norm.apex_kernels("apex", torch.zeros(1))


class OnGpu:
    """What the choice looks at."""

    is_cuda = True


def test_auto_takes_apex_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert norm.apex_kernels("auto", OnGpu()) is None
    kernels = types.ModuleType("apex.normalization.fused_layer_norm")
    monkeypatch.setattr(norm, "find_apex", lambda: kernels)
    assert norm.apex_kernels("auto", OnGpu()) is kernels
    assert norm.apex_kernels("torch", OnGpu()) is None
    with pytest.raises(MegalmError, match="needs a GPU"):
        norm.apex_kernels("apex", torch.zeros(1))
