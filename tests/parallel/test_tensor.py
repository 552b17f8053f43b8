"""megalm's factory over megatron-core's layers, on several ranks, against torch on whole tensors in fp64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.nn.attention import Attention
from megalm.nn.config import BlockConfig
from megalm.nn.init import Spec, declare, spec_of
from megalm.nn.layers import Layers
from tests.distributed import sabotage
from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, join

BATCH, SEQ = 2, 12
TOKENS, HIDDEN, INNER, ROWS = BATCH * SEQ, 16, 24, 40
LABELS = torch.arange(TOKENS) * 7 % ROWS

# How a tensor lies on the ranks: `tokens` are hidden states (cut along tokens under sequence parallelism, else whole),
# `columns` are cut along the last dimension, `whole` is on every rank.
Module = Callable[[Layers], nn.Module]


def cut(whole: Tensor, kind: str, layers: Layers, sequence_parallel: bool) -> Tensor:
    """This rank's part."""
    if kind == "columns":
        return whole.chunk(layers.tensor_size, dim=-1)[layers.tensor_rank]
    if kind == "tokens" and sequence_parallel:
        return whole.chunk(layers.tensor_size, dim=0)[layers.tensor_rank]
    return whole


def random(name: str, *shape: int) -> Tensor:
    seed = sum(byte * 31**place for place, byte in enumerate(name.encode())) % 2**31
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One use of the factory: forward(layers, module, x) with x and the output lying as `x_kind` and `out_kind` say."""

    forward: Callable[[Layers, nn.Module, Tensor], Tensor]
    shape: tuple[int, ...] = (TOKENS, HIDDEN)
    build: Module = lambda layers: nn.Module()
    x_kind: str = "tokens"
    out_kind: str = "tokens"
    tolerance: float = 1e-12


class Shared(nn.Module):
    """A parameter that every rank holds."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        declare(self.weight, Spec(std=1.0))


def _attention(layers: Layers, module: nn.Module, x: Tensor) -> Tensor:
    place = torch.arange(SEQ).repeat(BATCH, 1)
    return module(x, torch.zeros_like(place), place, torch.arange(BATCH))


def _partial(layers: Layers, module: nn.Module, x: Tensor) -> Tensor:
    rows = module.weight.shape[0] // layers.tensor_size
    mine = slice(layers.tensor_rank * rows, (layers.tensor_rank + 1) * rows)
    return F.linear(layers.enter(x), layers.partial(module.weight)[mine])


FP32 = 1e-6  # losses are computed in fp32

CASES = {
    "column": Case(
        lambda layers, module, x: module(layers.enter(x)),
        build=lambda layers: layers.column(HIDDEN, INNER, bias=False, std=1.0),
        out_kind="columns",
    ),
    "column with bias": Case(
        lambda layers, module, x: module(layers.enter(x)),
        build=lambda layers: layers.column(HIDDEN, INNER, bias=True, std=1.0),
        out_kind="columns",
    ),
    "row": Case(
        lambda layers, module, x: module(x),
        (TOKENS, INNER),
        build=lambda layers: layers.row(INNER, HIDDEN, bias=False, std=1.0),
        x_kind="columns",
    ),
    "row with bias": Case(
        lambda layers, module, x: module(x),
        (TOKENS, INNER),
        build=lambda layers: layers.row(INNER, HIDDEN, bias=True, std=1.0),
        x_kind="columns",
    ),
    "embedding": Case(
        # x only scales the rows that are looked up, so that there is something to differentiate
        lambda layers, module, x: module(LABELS) * x,
        build=lambda layers: layers.embedding(ROWS - 3, ROWS, HIDDEN, std=1.0),
    ),
    "split": Case(lambda layers, module, x: layers.split(x), x_kind="whole"),
    "replicated": Case(
        lambda layers, module, x: x * layers.replicated(module.weight), build=lambda layers: Shared(HIDDEN)
    ),
    "partial": Case(_partial, build=lambda layers: Shared(INNER, HIDDEN), out_kind="columns"),
    "project": Case(
        lambda layers, module, x: layers.project(layers.enter(x), module.weight),
        build=lambda layers: layers.embedding(ROWS, ROWS, HIDDEN, std=1.0),
        out_kind="columns",
    ),
    "cross_entropy": Case(
        lambda layers, module, x: layers.cross_entropy(x, LABELS),
        (TOKENS, ROWS),
        x_kind="columns",
        out_kind="whole",
        tolerance=FP32,
    ),
    "logsumexp": Case(
        lambda layers, module, x: layers.logsumexp(x * 30),
        (TOKENS, ROWS),
        x_kind="columns",
        out_kind="whole",
        tolerance=FP32,
    ),
    "attention": Case(
        _attention,
        build=lambda layers: Attention(
            BlockConfig(
                hidden_size=HIDDEN,
                num_attention_heads=4,
                num_key_value_heads=2,
                qk_norm=True,
                attention_bias=True,
                attention_output_bias=True,
                attention_backend="plain",
            ),
            layers,
            std=1.0,
            output_std=1.0,
            seed=0,
            site="here",
        ),
        tolerance=1e-5,  # the norms compute in fp32
    ),
}


def filled(case: Case, layers: Layers) -> nn.Module:
    """The case's module in fp64 with this rank's slices of random parameters."""
    module = case.build(layers).double()
    for name, parameter in module.named_parameters():
        dim, shape = spec_of(parameter).shard_dim, list(parameter.shape)
        if dim is None:
            parameter.data = random(name, *shape)
        else:
            shape[dim] *= layers.tensor_size
            parameter.data = random(name, *shape).chunk(layers.tensor_size, dim)[layers.tensor_rank].contiguous()
    return module


def results(case: Case, layers: Layers, sequence_parallel: bool) -> dict[str, Tensor]:
    """Output and gradients of this rank."""
    module = filled(case, layers)
    x = cut(random("x", *case.shape), case.x_kind, layers, sequence_parallel).contiguous().requires_grad_()
    out = case.forward(layers, module, x)
    whole_shape = (TOKENS,) if out.dim() == 1 else (TOKENS, out.shape[1] * _parts(case.out_kind, layers))
    seed = cut(random("seed", *whole_shape), case.out_kind, layers, sequence_parallel)
    out.backward(seed.to(out.dtype))
    assert x.grad is not None
    found = {"output": out.detach(), "gradient of x": x.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def _parts(kind: str, layers: Layers) -> int:
    return layers.tensor_size if kind == "columns" else 1


class Reference(Layers):
    """Plain torch in fp64, also where the plain factory would compute in fp32."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def logsumexp(self, logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, dim=-1)


def errors(ranks: int, sequence_parallel: bool, plant: Callable[[], None] | None = None) -> dict[str, float]:
    """Per case and quantity, the largest difference from the reference over its largest element, on this rank."""
    if plant:
        plant()
    from megalm.parallel.tensor import TensorParallelLayers

    joined = join(config(parallel={"tensor": ranks}))
    layers = TensorParallelLayers(joined.tensor_group, sequence_parallel=sequence_parallel)
    worst = {}
    for name, case in CASES.items():
        module = case.build(layers)
        dims = {parameter: spec_of(p).shard_dim for parameter, p in module.named_parameters()}
        ours, whole = results(case, layers, sequence_parallel), results(case, Reference(), False)
        for quantity, tensor in whole.items():
            if quantity in dims:
                dim = dims[quantity]
                expected = tensor if dim is None else tensor.chunk(ranks, dim)[layers.tensor_rank]
            else:
                kind = case.out_kind if quantity == "output" else case.x_kind
                expected = cut(tensor, kind, layers, sequence_parallel)
            assert ours[quantity].shape == expected.shape, f"{name}, {quantity}"
            difference = (ours[quantity].double() - expected).abs().max() / tensor.abs().max()
            worst[f"{name}: {quantity}"] = difference.item() / case.tolerance
    return worst


@cache
def over_ranks(ranks: int, sequence_parallel: bool, plant: Callable[[], None] | None = None) -> dict[str, float]:
    """The largest error of any rank, in units of its tolerance."""
    each = run_ranks(ranks, partial(errors, ranks, sequence_parallel, plant))
    return {name: max(rank[name] for rank in each) for name in each[0]}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layer_and_its_gradients_equal_torch(ranks: int, sequence_parallel: bool) -> None:
    """With 4 ranks, two of them share each key-value head of `attention`."""
    found = over_ranks(ranks, sequence_parallel)
    assert {name.split(":")[0] for name in found} == set(CASES)
    assert {name: error for name, error in found.items() if not error < 1} == {}


def _swapped() -> None:
    """Ranks that hold each other's slices, whatever megatron-core thinks of the vocabulary's."""
    from megalm.parallel import tensor

    right = tensor.TensorParallelLayers.__init__

    def swapped(self: Any, group: Any, **options: Any) -> None:
        right(self, group, **options)
        self.tensor_rank = self.tensor_size - 1 - self.tensor_rank

    tensor.TensorParallelLayers.__init__ = swapped  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("plant", "sequence_parallel", "seen_in"),
    [
        (sabotage.no_reduction_of_input_gradients, False, {"column", "project", "partial", "attention"}),
        (sabotage.no_reduction_of_norm_gradients, True, {"replicated", "row with bias"}),
        (_swapped, False, {"embedding", "cross_entropy"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_bugs_are_caught(plant: Any, sequence_parallel: bool, seen_in: set[str]) -> None:
    found = over_ranks(2, sequence_parallel, plant)
    caught = {name.split(":")[0] for name, error in found.items() if not error < 1}
    assert seen_in <= caught, found


def _loss_keeps_its_logits() -> bool:
    from megalm.parallel.tensor import TensorParallelLayers

    joined = join(config(parallel={"tensor": 2}))
    layers = TensorParallelLayers(joined.tensor_group, sequence_parallel=False)
    logits = random("x", TOKENS, ROWS // 2).float()
    before = logits.clone()
    layers.cross_entropy(logits, LABELS)
    return torch.equal(logits, before)


def test_the_loss_leaves_fp32_logits_as_they_were() -> None:
    assert all(run_ranks(2, _loss_keeps_its_logits))


def _saved_by_the_loss() -> list[tuple[torch.dtype, int]]:
    from torch.autograd.graph import saved_tensors_hooks

    from megalm.parallel.tensor import TensorParallelLayers

    joined = join(config(parallel={"tensor": 2}))
    layers = TensorParallelLayers(joined.tensor_group, sequence_parallel=False)
    logits = random("x", TOKENS, ROWS // 2).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layers.cross_entropy(logits, LABELS) + layers.logsumexp(logits)
    return [(x.dtype, x.dim()) for x in kept]


def test_no_logits_are_kept_in_fp32() -> None:
    for kept in run_ranks(2, _saved_by_the_loss):
        assert (torch.bfloat16, 2) in kept and (torch.float32, 2) not in kept


def _marks() -> dict[str, bool]:
    from megalm.parallel.tensor import TensorParallelLayers

    joined = join(config(parallel={"tensor": 2}))
    layers = TensorParallelLayers(joined.tensor_group, sequence_parallel=True)
    return {
        f"{name} {parameter}": bool(getattr(p, "tensor_model_parallel", False)) == (spec_of(p).shard_dim is not None)
        for name, case in CASES.items()
        for parameter, p in case.build(layers).named_parameters()
    }


def test_exactly_the_slices_are_marked_for_deepspeeds_norm() -> None:
    for marks in run_ranks(2, _marks):
        assert len(marks) > 10 and all(marks.values()), marks
