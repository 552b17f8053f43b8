"""Cross entropy and log-normaliser that never hold the logits in fp32.

A CPU goes through them some rows at a time, whose fp32 copy stays in its cache. On a GPU torch.compile makes one kernel
of each pass, which reads the logits and writes nothing but the result.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalm.errors import reason

logger = logging.getLogger(__name__)


def _normalizer(logits: Tensor) -> Tensor:
    """[tokens, vocab] -> [tokens], fp32."""
    return torch.logsumexp(logits.float(), dim=-1)


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(label), and the log-normaliser: both [tokens], fp32."""
    normalizer = _normalizer(logits)
    return normalizer - logits.gather(1, labels[:, None])[:, 0].float(), normalizer


def _gradient(logits: Tensor, normalizer: Tensor, labels: Tensor | None, gradient: Tensor) -> Tensor:
    """(probabilities - one_hot(label)) x gradient, or without labels probabilities x gradient, in logits' dtype."""
    chances = torch.exp(logits.float() - normalizer[:, None])
    if labels is not None:
        chances = chances - (torch.arange(logits.shape[1], device=logits.device) == labels[:, None])
    return (chances * gradient[:, None]).to(logits.dtype)


class _Kernels(NamedTuple):
    """The three functions above, each as one kernel."""

    normalizer: Callable[..., Tensor]
    losses: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def _compile() -> _Kernels:
    return _Kernels(torch.compile(_normalizer), torch.compile(_losses), torch.compile(_gradient))


@cache
def _kernels(device: torch.device) -> _Kernels | None:
    """None where they go through the logits in chunks."""
    if device.type == "cpu":
        return None
    if problem := _problem(device):
        logger.warning("the loss takes slower kernels, for those of torch.compile do not work here: %s", problem)
        return None
    return _compile()


def _problem(device: torch.device) -> str:
    """Why not to trust what torch.compile makes for `device`; empty if its loss and gradient are torch's.

    The functions are tried out within another one: those that a run calls then are compiled for its shapes alone, which
    halves their time on an H100, and not for any.
    """
    logits = torch.linspace(-4, 4, 6 * 40, device=device).view(6, 40)
    labels, weights = torch.arange(6, device=device) * 5, torch.linspace(0.5, 1, 6, device=device)

    @torch.compile
    def ours() -> tuple[Tensor, Tensor]:
        losses, normalizer = _losses(logits, labels)
        return losses, _gradient(logits, normalizer, labels, weights)

    def torchs(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            losses = torchs(leaf)
            expected = losses.detach(), torch.autograd.grad(losses, leaf, weights)[0]
        for result, reference in zip(ours(), expected, strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)
    except Exception as error:  # whatever its compilers say
        return reason(error)
    return ""


def fused(device: torch.device) -> bool:
    """Whether each pass of a loss is one kernel on this device."""
    return _kernels(device) is not None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows whose fp32 copy stays in a CPU's cache, or is small beside a GPU's memory."""
    elements = 2**27 if logits.is_cuda else 2**19
    step = max(1, elements // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        if kernels := _kernels(logits.device):
            losses, normalizer = kernels.losses(logits, labels)
            ctx.save_for_backward(logits, labels, normalizer)
            return losses
        ctx.save_for_backward(logits, labels)
        chunks = [F.cross_entropy(logits[rows].float(), labels[rows], reduction="none") for rows in _chunks(logits)]
        return torch.cat(chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """d loss / d logits = probabilities - one_hot(label), of every row."""
        logits, labels, *normalizer = ctx.saved_tensors
        if kernels := _kernels(logits.device):
            return kernels.gradient(logits, *normalizer, labels, gradient), None
        logits_gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = logits[rows].float().softmax(dim=-1)
            chunk.scatter_add_(1, labels[rows, None], chunk.new_full((len(chunk), 1), -1.0))
            logits_gradient[rows] = chunk.mul_(gradient[rows, None])
            del chunk  # before the next one
        return logits_gradient, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor) -> Tensor:
        if kernels := _kernels(logits.device):
            normalizer = kernels.normalizer(logits)
        else:
            normalizer = torch.cat([_normalizer(logits[rows]) for rows in _chunks(logits)])
        ctx.save_for_backward(logits, normalizer)
        return normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        logits, normalizer = ctx.saved_tensors
        if kernels := _kernels(logits.device):
            return kernels.gradient(logits, normalizer, None, gradient)
        logits_gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = logits[rows].float().sub_(normalizer[rows, None]).exp_()
            logits_gradient[rows] = chunk.mul_(gradient[rows, None])
            del chunk
        return logits_gradient


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every token: [tokens, vocab], [tokens] -> [tokens], computed in fp32."""
    return _CrossEntropy.apply(logits, labels)


def logsumexp(logits: Tensor) -> Tensor:
    """Log-normaliser of every token: [tokens, vocab] -> [tokens], computed in fp32."""
    return _LogSumExp.apply(logits)
