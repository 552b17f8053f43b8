"""A gate before a layer, through which gradients pass or not."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class _Gated(torch.autograd.Function):
    """Identity, whose gradient is multiplied by 0 or 1."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, is_open: bool) -> Tensor:
        ctx.is_open = is_open  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        # Zeros and not nothing: every engine finds the gradients it waits for, and moments and norms see none of them.
        return gradient if ctx.is_open else torch.zeros_like(gradient), None


class Gate:
    """Stands before a layer of the stream; closed, everything before the layer has a gradient of exactly zero."""

    def __init__(self) -> None:
        self.is_open = True

    def __call__(self, layer: nn.Module, inputs: tuple[tuple[Tensor, ...], ...]) -> tuple[tuple[Tensor, ...]]:
        """The hook of the layer's inputs."""
        hidden, *rest = inputs[0]
        return ((_Gated.apply(hidden, self.is_open), *rest),)


def gate(layer: nn.Module) -> nn.Module:
    """Put a gate before a layer; returns the layer."""
    made = Gate()
    layer.gradient_gate = made  # type: ignore[assignment]
    layer.register_forward_pre_hook(made)
    return layer


def gates(module: nn.Module) -> list[Gate]:
    """Every gate within a module."""
    found = (getattr(layer, "gradient_gate", None) for layer in module.modules())
    return [each for each in found if isinstance(each, Gate)]
