"""The loss and its gradient against the formula in fp64."""

import pytest
import torch
from torch import Tensor

from megalm.nn import cross_entropy
from megalm.nn.layers import Layers
from megalm.nn.loss import token_loss

BATCH, SEQ, VOCAB = 3, 5, 37


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(BATCH * SEQ, VOCAB, generator=draw) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=draw)
    weights = torch.rand(BATCH, SEQ, generator=draw) * (torch.rand(BATCH, SEQ, generator=draw) > 0.3)
    return logits, labels, weights


def formula(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, label, weight in zip(logits.double(), labels.flatten(), weights.flatten().double(), strict=True):
        normaliser = row.exp().sum().log()
        total = total + weight * (normaliser - row[label] + z_loss * normaliser**2)
    return total


def difference(z_loss: float, planted: float | None = None, dtype: torch.dtype = torch.float32) -> float:
    logits, labels, weights = tensors(dtype)
    reference = logits.detach().double().requires_grad_()
    loss = token_loss(Layers(), logits, labels, weights, z_loss if planted is None else planted)
    expected = formula(reference, labels, weights, z_loss)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    return max((loss - expected).abs().item() / 10, (logits.grad.double() - reference.grad).abs().max().item())


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_the_formula(z_loss: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are taken at a time."""
    monkeypatch.setattr(cross_entropy, "_chunks", lambda x: [slice(a, a + rows) for a in range(0, BATCH * SEQ, rows)])
    assert difference(z_loss) < 1e-6


def test_the_kernels_of_a_gpu_equal_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for this CPU, where chunks are faster."""
    kernels = cross_entropy._compile()
    monkeypatch.setattr(cross_entropy, "_kernels", lambda device: kernels)
    for z_loss in (0.0, 0.1):
        assert difference(z_loss) < 1e-6
    with torch.compiler.set_stance("force_eager"):  # where torch gives up compiling
        assert difference(0.1) < 1e-6
    assert difference(0.01, dtype=torch.bfloat16) < 5e-3
    assert difference(0.01, planted=0.0) > 1e-4


def test_comparison_catches_a_missing_z_loss_and_weights() -> None:
    assert difference(0.01, planted=0.0) > 1e-4
    assert difference(0.0, planted=1e-4) > 1e-6


def test_bf16_logits_are_widened_first() -> None:
    assert difference(0.01, dtype=torch.bfloat16) < 5e-3  # the gradient is a bf16 number
    logits, labels, weights = tensors(torch.bfloat16)
    loss = token_loss(Layers(), logits, labels, weights, 0.01)
    assert abs(loss.item() - formula(logits, labels, weights, 0.01).item()) < 1e-5 * abs(loss.item())


def test_chunks_cover_every_row_once() -> None:
    for rows, width in ((1, 10), (7, 2**18), (100, 2**21)):
        logits = torch.zeros(1).expand(rows, width)
        covered = [row for chunk in cross_entropy._chunks(logits) for row in range(rows)[chunk]]
        assert covered == list(range(rows))


def test_weightless_tokens_do_not_matter() -> None:
    logits, labels, weights = tensors()
    other = torch.where(weights > 0, labels, (labels + 1) % VOCAB)
    assert not torch.equal(labels, other)
    assert token_loss(Layers(), logits, labels, weights) == token_loss(Layers(), logits, other, weights)
