"""nn's layer factory over megatron-core: tensor parallelism, with or without sequence parallelism.

T is the tensor-parallel degree. Weights are laid out so that the full tensor is the concatenation of the ranks'
slices along one dimension (Shoeybi et al. 2019). Under sequence parallelism (Korthikanti et al. 2022) hidden states
are cut along the flattened tokens, [tokens / T, hidden], between the sub-layers.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megalm.nn import cross_entropy
from megalm.nn.init import Spec, declare
from megalm.nn.layers import Layers


def _no_init(weight: Tensor) -> None:
    raise AssertionError("weights are drawn by nn.init, never by megatron-core")


def _declare_slice(parameter: nn.Parameter, spec: Spec) -> None:
    """Mark a slice for nn.init and for DeepSpeed, which sums the norms of marked parameters over tensor ranks."""
    assert spec.shard_dim is not None
    declare(parameter, spec)
    # megatron-core sets this only on biases, and on weights that it initialises itself.
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


class _Column(ColumnParallelLinear):
    """Returns the output alone. `enter` has gathered its input and will reduce its gradient."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)[0]


class _Row(RowParallelLinear):
    """Adds the bias itself: under sequence parallelism each rank adds it to its own tokens only."""

    layers: "TensorParallelLayers"

    def _forward_impl(self, *args: Any, **options: Any) -> Tensor:
        # megatron-core passes no group and then warns of that, on one rank, where torch.compile would have to stop.
        return super()._forward_impl(*args, **options | {"tp_group": self.tp_group})

    def forward(self, x: Tensor) -> Tensor:
        out, bias = super().forward(x)
        return out if bias is None else out + self.layers.replicated(bias)


class _Embedding(VocabParallelEmbedding):
    """Under sequence parallelism the sum over vocabulary slices is scattered over tokens at once."""

    def forward(self, ids: Tensor) -> Tensor:
        # [tokens] -> [1, tokens], which megatron-core turns into [tokens / T, 1, hidden] when it scatters.
        hidden = super().forward(ids[None])
        return hidden.view(-1, hidden.shape[-1])


class TensorParallelLayers(Layers):
    """megatron-core's layers behind the factory's names."""

    def __init__(self, group: dist.ProcessGroup, *, sequence_parallel: bool):
        self.group = group
        self.tensor_size = dist.get_world_size(group)
        self.tensor_rank = dist.get_rank(group)
        self.sequence_parallel = sequence_parallel
        self._plain = ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_size, use_cpu_initialization=True, perform_initialization=False
        )
        self._scattered = replace(self._plain, sequence_parallel=sequence_parallel)

    def column(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        layer = _Column(
            in_features,
            out_features,
            bias=bias,
            config=self._plain,
            init_method=_no_init,
            disable_grad_reduce=True,
            tp_group=self.group,
        )
        _declare_slice(layer.weight, Spec(std=std, shard_dim=0))
        if bias:
            _declare_slice(layer.bias, Spec(value=0.0, shard_dim=0))
        return layer

    def row(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        layer = _Row(
            in_features,
            out_features,
            bias=bias,
            config=self._scattered,
            init_method=_no_init,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.group,
        )
        layer.layers = self
        _declare_slice(layer.weight, Spec(std=std, shard_dim=1))
        if bias:
            declare(layer.bias, Spec(value=0.0))
        return layer

    def embedding(self, num_embeddings: int, rows: int, width: int, *, std: float) -> nn.Module:
        layer = _Embedding(
            rows,
            width,
            config=self._plain,
            init_method=_no_init,
            reduce_scatter_embeddings=self.sequence_parallel,
            tp_group=self.group,
        )
        _declare_slice(layer.weight, Spec(std=std, shard_dim=0, drawn_rows=num_embeddings))
        return layer

    def enter(self, hidden: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self.group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.group)

    def split(self, x: Tensor) -> Tensor:
        return scatter_to_sequence_parallel_region(x, group=self.group) if self.sequence_parallel else x

    def collect(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return x
        # All ranks compute the same from here on, so each has the whole gradient of all tokens: it is cut, not summed.
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.group)

    def replicated(self, parameter: Tensor) -> Tensor:
        return self.partial(parameter) if self.sequence_parallel else parameter

    def partial(self, parameter: Tensor) -> Tensor:
        # Identity forward, all-reduce backward: the sum is done inside autograd, so that every ZeRO stage and
        # pipeline sees a whole gradient and needs no step of its own.
        return copy_to_tensor_model_parallel_region(parameter, group=self.group)

    def reduce(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.group)
        return reduce_from_tensor_model_parallel_region(x, group=self.group)

    def total(self, x: Tensor) -> Tensor:
        summed = x.detach().clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    def gather(self, logits: Tensor) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits, group=self.group)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _CrossEntropy.apply(logits, labels, self.group)

    def logsumexp(self, logits: Tensor) -> Tensor:
        return cross_entropy.logsumexp(logits, partial(_whole_normalizer, group=self.group))


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy over columns that are cut over ranks (Shoeybi et al. 2019, section 3). megatron-core's holds the
    logits in fp32; this one only ever holds what the model computed, as nn.cross_entropy does."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        labels = labels - dist.get_rank(group) * logits.shape[1]
        column, mine = cross_entropy.here(labels, logits.shape[1])
        label_logits = logits.gather(1, column[:, None])[:, 0].float().masked_fill_(~mine, 0.0)
        dist.all_reduce(label_logits, group=group)
        top, above = _whole_normalizer(logits, group)
        ctx.save_for_backward(logits, labels, top, above)
        return top - label_logits + above

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        logits, labels, top, above = ctx.saved_tensors
        return cross_entropy.gradient_of(logits, top, above, labels, gradient), None, None


def _whole_normalizer(logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """nn.cross_entropy.normalizer_of() all ranks' columns."""
    own, above = cross_entropy.normalizer_of(logits)
    top = own.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    mass = torch.exp(own - top + above)
    dist.all_reduce(mass, group=group)
    return top, mass.log_()
