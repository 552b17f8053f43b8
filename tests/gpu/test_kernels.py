"""Kernels on a GPU against the same formulas on the CPU in fp64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.nn import norm
from megalm.nn.cross_entropy import cross_entropy, logsumexp
from megalm.nn.kernels import BACKENDS, Mask, Requirements, attention, resolve
from megalm.nn.layers import Layers
from megalm.nn.norm import LayerNorm, RMSNorm
from megalm.nn.position import alibi_slopes, rotary_angles, rotate

pytestmark = pytest.mark.gpu

BATCH, SEQ, HEADS, DIM = 2, 320, 4, 64  # 320 = 64 mod 128: where cuDNN's gradients are NaN with a mask tensor
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MASKS = ("causal", "full", "segments", "window", "window-segments", "alibi", "prefix")


def mask_of(name: str, device: torch.device, seq: int = SEQ) -> Mask:
    segments = (torch.arange(seq, device=device) // 90).repeat(BATCH, 1) if "segments" in name else None
    return Mask(
        kind=name if name in ("full", "prefix") else "causal",
        window=50 if "window" in name else None,
        query_segments=segments,
        key_segments=segments,
        prefix_lengths=torch.tensor([7, 150], device=device) if name == "prefix" else None,
        slopes=alibi_slopes(HEADS, device) if name == "alibi" else None,
    )


def needs_of(name: str, dtype: torch.dtype, group: int, long: bool = False) -> Requirements:
    return Requirements(
        "cuda",
        dtype,
        head_dim=DIM,
        group=group,
        kind=name if name in ("full", "prefix") else "causal",
        segments="segments" in name,
        window="window" in name,
        alibi=name == "alibi",
        long=long,
    )


def results(
    function: Callable[..., Tensor], leaves: list[Tensor], seed: Tensor, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of all leaves, in fp64 on the CPU."""
    inputs = [leaf.to(device, dtype, copy=True).requires_grad_() for leaf in leaves]
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, seed.to(device, out.dtype))
    return [part.detach().to(CPU, torch.float64) for part in (out, *gradients)]


def distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The worst relative distance; NaN if anything is."""
    distances = torch.stack([(a - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)])
    return distances.max().item()  # max() hands NaN on


def samples(kv_heads: int, dtype: torch.dtype, seq: int = SEQ) -> tuple[list[Tensor], Tensor]:
    """q, k and v as numbers of `dtype`, and a gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(BATCH, seq, heads, DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    q, k, v, seed = (torch.randn(shape, generator=draw) for shape in shapes)
    return [x.to(dtype).float() for x in (2 * q, 2 * k, v)], seed.to(dtype).float()


def attend(backend: str, name: str, device: torch.device, seq: int = SEQ) -> Callable[..., Tensor]:
    return lambda q, k, v: attention(q, k, v, mask_of(name, device, seq), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_that_is_here(backend: str, name: str, kv_heads: int, dtype: torch.dtype) -> None:
    needs = needs_of(name, dtype, HEADS // kv_heads)
    if refusal := BACKENDS[backend].refusal(needs):
        pytest.skip(refusal)
    leaves, seed = samples(kv_heads, dtype)
    exact = results(attend("plain", name, CPU), leaves, seed, CPU, torch.float64)
    ours = results(attend(backend, name, GPU), leaves, seed, GPU, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.015
    assert distance(ours, exact) < tolerance
    wrong = results(attend("plain", "window" if name != "window" else "causal", CPU), leaves, seed, CPU, torch.float64)
    assert distance(ours, wrong) > 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["causal", "segments", "alibi"])
def test_long_rows_of_grouped_heads_keep_no_scores(name: str, dtype: torch.dtype) -> None:
    """Forward and backward passes over 8192 tokens take less memory than the scores alone would."""
    seq = 8192
    leaves, seed = samples(1, dtype, seq)
    inputs = [leaf.to(GPU, dtype).requires_grad_() for leaf in leaves]
    seed = seed.to(GPU, dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend("sdpa", name, GPU, seq)(*inputs)
    torch.autograd.grad(out, inputs, seed)
    # a mask tensor, given or not, is a few numbers per pair of positions; the scores are more per pair and head
    mask_bytes = 0 if name == "causal" else seq * seq * (4 * HEADS if name == "alibi" else BATCH)
    scores_bytes = BATCH * HEADS * seq * seq * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before < 4 * mask_bytes + scores_bytes


@pytest.fixture
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuBLAS asks for its workspace to be fixed; the plain products here are made after it is."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MASKS)
def test_the_chosen_kernel_is_reproducible_where_torch_asks(name: str, reproducible: None) -> None:
    """Gradients of rows that many thread blocks add to are the same bits in every run."""
    seq = 2048
    chosen = resolve("auto", needs_of(name, torch.bfloat16, 2, long=True))
    leaves, seed = samples(2, torch.bfloat16, seq)
    first = results(attend(chosen, name, GPU, seq), leaves, seed, GPU, torch.bfloat16)
    for _ in range(4):
        again = results(attend(chosen, name, GPU, seq), leaves, seed, GPU, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("implementation", ["torch", "apex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms(kind: type, dtype: torch.dtype, implementation: str) -> None:
    if implementation == "apex" and norm.resolve_norm("auto", "cuda") == "torch":
        pytest.skip("apex is not here or fails its self-check")
    draw = torch.Generator().manual_seed(0)
    width, eps = 256, 1e-3
    shapes = [(64, width), (width,)] + ([(width,)] if kind is LayerNorm else [])
    leaves = [torch.randn(shape, generator=draw).to(dtype).float() for shape in shapes]
    seed = torch.randn(64, width, generator=draw).to(dtype).float()

    def mine(x: Tensor, *parameters: Tensor) -> Tensor:
        module = kind(width, eps, implementation, Layers().replicated).to(x.device, x.dtype)
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = eps) -> Tensor:
        if kind is LayerNorm:
            x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + (0 if bias is None else bias)

    ours = results(mine, leaves, seed, GPU, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert distance(ours, results(formula, leaves, seed, CPU, torch.float64)) < tolerance

    def biased(*leaves: Tensor) -> Tensor:
        return formula(*leaves, eps=0.1)

    assert distance(ours, results(biased, leaves, seed, CPU, torch.float64)) > 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rotary(dtype: torch.dtype) -> None:
    """The rotation by exact angles; far positions lose digits of the angle in fp32, by at most 1e-4 radians here."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 3, 32, generator=draw).to(dtype).float()
    seed = torch.randn(2, 50, 3, 32, generator=draw).to(dtype).float()
    positions = torch.stack((torch.arange(50), torch.arange(900, 950)))

    def mine(x: Tensor) -> Tensor:
        return rotate(x, *rotary_angles(positions.to(x.device), 32, 10000.0, None))

    def formula(x: Tensor, shift: int = 0) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        angles = (positions + shift).double()[:, :, None, None] * frequencies
        first, second = x.chunk(2, -1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    ours = results(mine, [x], seed, GPU, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.005
    assert distance(ours, results(formula, [x], seed, CPU, torch.float64)) < tolerance
    assert distance(ours, results(lambda x: formula(x, shift=1), [x], seed, CPU, torch.float64)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy_and_normalizer(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 1000, generator=draw)).to(dtype).float()
    labels = torch.randint(1000, (40,), generator=draw)
    seed = torch.rand(40, generator=draw)
    tolerance = 1e-5 if dtype == torch.float32 else 0.005

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels.to(logits.device))

    def exact_loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def exact_normalizer(logits: Tensor) -> Tensor:
        return logits.exp().sum(-1).log()

    for mine, exact in ((loss, exact_loss), (logsumexp, exact_normalizer)):
        ours = results(mine, [logits], seed, GPU, dtype)
        assert distance(ours, results(exact, [logits], seed, CPU, torch.float64)) < tolerance
    shifted = results(lambda x: exact_loss(x, labels.roll(1)), [logits], seed, CPU, torch.float64)
    assert distance(results(loss, [logits], seed, GPU, dtype), shifted) > 0.1
