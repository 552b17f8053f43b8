"""Cross entropy and log-normaliser that never hold the logits in fp32: they go through them some rows at a time."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows whose fp32 copy stays in a CPU's cache, or is small beside a GPU's memory."""
    elements = 2**27 if logits.is_cuda else 2**19
    step = max(1, elements // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        losses = [F.cross_entropy(logits[rows].float(), labels[rows], reduction="none") for rows in _chunks(logits)]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """d loss / d logits = probabilities - one_hot(label), of every row."""
        logits, labels = ctx.saved_tensors
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
        ctx.save_for_backward(logits)
        return torch.cat([torch.logsumexp(logits[rows].float(), dim=-1) for rows in _chunks(logits)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (logits,) = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = logits[rows].float().softmax(dim=-1)
            logits_gradient[rows] = chunk.mul_(gradient[rows, None])
            del chunk
        return logits_gradient


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every token: [tokens, vocab], [tokens] -> [tokens], computed in fp32."""
    return _CrossEntropy.apply(logits, labels)


def logsumexp(logits: Tensor) -> Tensor:
    """Log-normaliser of every token: [tokens, vocab] -> [tokens], computed in fp32."""
    return _LogSumExp.apply(logits)
