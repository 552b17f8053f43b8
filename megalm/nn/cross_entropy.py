"""Cross entropy and log-normaliser that never hold the logits in fp32: they go through them some rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows whose fp32 copy stays in a CPU's cache, or is small beside a GPU's memory."""
    elements = 2**27 if logits.is_cuda else 2**19
    step = max(1, elements // logits.shape[1])
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        normaliser = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _row_chunks(logits):
            normaliser[rows] = torch.logsumexp(logits[rows].float(), dim=-1)
        ctx.save_for_backward(logits, labels, normaliser)
        return normaliser - logits.gather(1, labels[:, None]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """d loss / d logits = probabilities - one_hot(label), of every row."""
        logits, labels, normaliser = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            chunk = (logits[rows] - normaliser[rows, None]).exp_()
            chunk.scatter_add_(1, labels[rows, None], chunk.new_full((len(chunk), 1), -1.0))
            torch.mul(chunk, gradient[rows, None], out=logits_gradient[rows])
        return logits_gradient, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor) -> Tensor:
        normaliser = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _row_chunks(logits):
            normaliser[rows] = torch.logsumexp(logits[rows].float(), dim=-1)
        ctx.save_for_backward(logits, normaliser)
        return normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        logits, normaliser = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            chunk = (logits[rows] - normaliser[rows, None]).exp_()
            torch.mul(chunk, gradient[rows, None], out=logits_gradient[rows])
        return logits_gradient


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every token: [tokens, vocab], [tokens] -> [tokens], computed in fp32."""
    return _CrossEntropy.apply(logits, labels)


def logsumexp(logits: Tensor) -> Tensor:
    """Log-normaliser of every token: [tokens, vocab] -> [tokens], computed in fp32."""
    return _LogSumExp.apply(logits)
