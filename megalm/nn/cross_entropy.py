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

Normalizer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""As normalizer_of()."""


def _normalizer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[tokens, vocab] -> the largest logit and what the log-normaliser is above it: both [tokens], fp32. Apart, since
    fp32 has few digits left for probabilities once large numbers are added up."""
    wide = logits.float()
    top = wide.amax(dim=-1)
    return top, torch.exp(wide - top[:, None]).sum(dim=-1).log()


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log p(label), and the normaliser's two parts: all [tokens], fp32."""
    top, above = _normalizer(logits)
    return top - logits.gather(1, labels[:, None])[:, 0].float() + above, top, above


def _gradient(logits: Tensor, top: Tensor, above: Tensor, labels: Tensor | None, gradient: Tensor) -> Tensor:
    """(probabilities - one_hot(label)) x gradient, or without labels probabilities x gradient, in logits' dtype."""
    chances = torch.exp(logits.float() - top[:, None] - above[:, None])
    if labels is not None:
        own = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
        chances = chances - own.to(chances.dtype)
    return (chances * gradient[:, None]).to(logits.dtype)


class _Kernels(NamedTuple):
    """The three functions above, each as one kernel."""

    normalizer: Callable[..., tuple[Tensor, Tensor]]
    losses: Callable[..., tuple[Tensor, Tensor, Tensor]]
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

    @torch.compile
    def ours(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        losses, top, above = _losses(logits, labels)
        return losses, _gradient(logits, top, above, labels, weights)

    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = torch.linspace(-4, 4, 6 * 40, device=device).view(6, 40)
            labels, weights = torch.arange(6, device=device) * 5, torch.linspace(0.5, 1, 6, device=device)
            leaf = logits.clone().requires_grad_()
            losses = F.cross_entropy(leaf, labels, reduction="none")
            expected = losses.detach(), torch.autograd.grad(losses, leaf, weights)[0]
            for result, reference in zip(ours(logits, labels, weights), expected, strict=True):
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
            losses, top, above = kernels.losses(logits, labels)
            ctx.save_for_backward(logits, labels, top, above)
            return losses
        # torch's own functions take a CPU half the time of those above.
        ctx.save_for_backward(logits, labels)
        chunks = [F.cross_entropy(logits[rows].float(), labels[rows], reduction="none") for rows in _chunks(logits)]
        return torch.cat(chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """d loss / d logits = probabilities - one_hot(label), of every row."""
        logits, labels, *normalizer = ctx.saved_tensors
        if normalizer:
            top, above = normalizer
            return gradient_of(logits, top, above, labels, gradient), None
        logits_gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = logits[rows].float().softmax(dim=-1)
            chunk.scatter_add_(1, labels[rows, None], chunk.new_full((len(chunk), 1), -1.0))
            logits_gradient[rows] = chunk.mul_(gradient[rows, None])
            del chunk  # before the next one
        return logits_gradient, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, normalizer: Normalizer) -> Tensor:
        top, above = normalizer(logits)
        ctx.save_for_backward(logits, top, above)
        return top + above

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        logits, top, above = ctx.saved_tensors
        return gradient_of(logits, top, above, None, gradient), None


def normalizer_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of these columns and what their log-normaliser is above it, which autograd does not see:
    [tokens, columns] -> two [tokens], fp32."""
    if kernels := _kernels(logits.device):
        return kernels.normalizer(logits)
    tops, aboves = zip(*(_normalizer(logits[rows]) for rows in _chunks(logits)))
    return torch.cat(tops), torch.cat(aboves)


def gradient_of(logits: Tensor, top: Tensor, above: Tensor, labels: Tensor | None, gradient: Tensor) -> Tensor:
    """(exp(logits - normaliser) - one_hot(label)) x gradient, in logits' dtype; without labels, without the one-hot.

    logits [tokens, columns], a part of the vocabulary or all of it; the others [tokens]. The normaliser is top + above.
    A label that is no column has no one.
    """
    if kernels := _kernels(logits.device):
        return kernels.gradient(logits, top, above, labels, gradient)
    logits_gradient = torch.empty_like(logits)
    for rows in _chunks(logits):
        chunk = logits[rows].float().sub(top[rows, None]).sub_(above[rows, None]).exp_()
        if labels is not None:
            column, mine = here(labels[rows], logits.shape[1])
            chunk.scatter_add_(1, column[:, None], -mine[:, None].to(chunk.dtype))
        logits_gradient[rows] = chunk.mul_(gradient[rows, None])
        del chunk  # before the next one
    return logits_gradient


def here(labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """A column for every label, and whether it is the label's own."""
    return labels.clamp(0, columns - 1), (labels >= 0) & (labels < columns)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every token: [tokens, vocab], [tokens] -> [tokens], computed in fp32."""
    return _CrossEntropy.apply(logits, labels)


def logsumexp(logits: Tensor, normalizer: Normalizer = normalizer_of) -> Tensor:
    """Log-normaliser of every token: [tokens, vocab] -> [tokens], computed in fp32. normalizer: finds it, also where
    there are more columns than these."""
    return _LogSumExp.apply(logits, normalizer)
