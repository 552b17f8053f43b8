"""RMSNorm and LayerNorm: torch's kernels, or NVIDIA apex's fused ones on a GPU."""

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megalm import nvidia_apex
from megalm.errors import MegalmError, reason
from megalm.nn.config import BlockConfig
from megalm.nn.init import Spec, declare
from megalm.nn.layers import Layers

KEY = "model.norm_implementation"
_APEX = "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"

logger = logging.getLogger(__name__)


def resolve_norm(implementation: str, device: str) -> str:
    """What a run's norms take for `implementation` (auto, torch, apex) on `device` (cpu, cuda): torch or apex.

    Raises MegalmError where apex was named and cannot serve; `auto` logs why it passed it over.
    """
    return "torch" if apex_kernels(implementation, device) is None else "apex"


@cache
def apex_kernels(implementation: str, device: str) -> ModuleType | None:
    """apex's module of fused norms if resolve_norm() takes it, else None."""
    if implementation == "apex":
        kernels = nvidia_apex.require(KEY, *_APEX)
        if device != "cuda":
            raise MegalmError(f"{KEY} is apex, which needs a GPU: set it to auto or torch")
        if problem := _self_check(kernels, device):
            raise MegalmError(f"{KEY} is apex, but {problem}: {nvidia_apex.HOW_TO_INSTALL}, or set {KEY} to auto")
        return kernels
    if implementation == "torch" or device != "cuda":
        return None
    found = nvidia_apex.find(*_APEX)
    if found is not None and (problem := _self_check(found, device)):
        logger.warning("%s: auto passes over apex: %s", KEY, problem)
        return None
    return found


def _self_check(kernels: ModuleType, device: str) -> str | None:
    """Compare both norms and their gradients with torch's in fp32 on a few rows; why not to trust them, or None."""
    draw = torch.Generator().manual_seed(0)
    eps, width = 1e-3, 64

    def check(dtype: torch.dtype) -> None:
        x, weight, bias, seed = (
            torch.randn(shape, generator=draw).to(device, dtype)
            for shape in ((8, width), (width,), (width,), (8, width))
        )

        def run(function: Callable[..., Tensor], to: torch.dtype, *leaves: Tensor) -> list[Tensor]:
            inputs = [leaf.to(to, copy=True).requires_grad_() for leaf in leaves]
            out = function(*inputs)
            return [part.detach().float() for part in (out, *torch.autograd.grad(out, inputs, seed.to(to)))]

        pairs = (
            (
                run(lambda x, w: kernels.fused_rms_norm_affine(x, w, w.shape, eps), dtype, x, weight),
                run(lambda x, w: F.rms_norm(x, w.shape, w, eps), torch.float32, x, weight),
            ),
            (
                run(lambda x, w, b: kernels.fused_layer_norm_affine(x, w, b, w.shape, eps), dtype, x, weight, bias),
                run(lambda x, w, b: F.layer_norm(x, w.shape, w, b, eps), torch.float32, x, weight, bias),
            ),
        )
        for ours, theirs in pairs:
            for result, reference in zip(ours, theirs, strict=True):
                distance = ((result - reference).norm() / reference.norm()).item()
                if not distance < max(1e-5, 2 * torch.finfo(dtype).eps):
                    raise ArithmeticError(f"a result is {distance:.1e} from torch's, relatively, in {dtype}")

    try:
        # the caller may be evaluating, or recomputing, and must not see the tensors of this check
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            check(torch.float32)
            check(torch.bfloat16)
    except Exception as error:  # a kernel built for another GPU fails in any way it likes
        return f"its norms fail their self-check ({reason(error)})"
    return None


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number per row, for devices where torch has no fused backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # [..., width], fp32
        product = normed * gradient
        weight_gradient = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (product @ weight.to(product.dtype)).unsqueeze(-1).div_(x.shape[-1])
        x_gradient = (gradient * weight.to(product.dtype)).sub_(normed.mul_(mean)).mul_(scale)
        return x_gradient.to(x.dtype), weight_gradient, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x weight over the last dimension, in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float, implementation: str, shared: Callable[[Tensor], Tensor]) -> None:
        """shared: the factory's method that says which part of the rows this rank sees (replicated or partial)."""
        super().__init__()
        self.eps = eps
        self.implementation = implementation
        self.shared = shared
        self.weight = nn.Parameter(torch.empty(width))
        declare(self.weight, Spec(value=1.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.shared(self.weight)
        apex = _fused(self.implementation, x)
        if apex is not None:
            return apex.fused_rms_norm_affine(x, weight, weight.shape, self.eps)
        if x.is_cuda:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) x weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, implementation: str, shared: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.eps = eps
        self.implementation = implementation
        self.shared = shared
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        declare(self.weight, Spec(value=1.0))
        declare(self.bias, Spec(value=0.0))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.shared(self.weight), self.shared(self.bias)
        apex = _fused(self.implementation, x)
        if apex is not None:
            return apex.fused_layer_norm_affine(x, weight, bias, weight.shape, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def _fused(implementation: str, x: Tensor) -> ModuleType | None:
    """apex's kernels, but for torch.compile, which fuses more than the norm."""
    return None if torch.compiler.is_compiling() else apex_kernels(implementation, x.device.type)


def hidden_norm(config: BlockConfig, layers: Layers) -> nn.Module:
    """The configured norm of hidden states: [tokens, hidden] -> the same."""
    kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return kind(config.hidden_size, config.norm_eps, config.norm_implementation, layers.replicated)
