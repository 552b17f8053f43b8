"""Bugs to plant in a rank, each of which the comparison of curves must catch; and one pretence."""

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megalm.parallel import engine, tensor
from megalm.training import build


def pretend_fp16() -> None:
    """torch multiplies fp16 on any CPU; DeepSpeed only wants to where that is fast."""
    get_accelerator().is_fp16_supported = lambda: True  # type: ignore[method-assign]


def no_reduction_of_input_gradients() -> None:
    tensor.TensorParallelLayers.enter = lambda self, hidden: hidden  # type: ignore[method-assign]


def no_reduction_of_norm_gradients() -> None:
    tensor.TensorParallelLayers.replicated = lambda self, parameter: parameter  # type: ignore[method-assign]


def swapped_shards() -> None:
    right = build.build_model

    def swapped(specs, seed, rank, size):  # type: ignore[no-untyped-def]
        return right(specs, seed, size - 1 - rank, size)

    build.build_model = swapped


def mean_of_micro_batch_means() -> None:
    """The classic: average each micro-batch's own mean, however few tokens it trains."""

    def weigh(self, micro_batches, count):  # type: ignore[no-untyped-def]
        each = [(inputs, (labels, mask / mask.sum().clamp(min=1))) for inputs, (labels, mask) in micro_batches]
        return each, right(self, micro_batches, count)[1]

    right = engine.Engine._weigh
    engine.Engine._weigh = weigh  # type: ignore[method-assign]


def shifted_labels() -> None:
    right = build.token_loss

    def shifted(layers, logits, labels: Tensor, *rest):  # type: ignore[no-untyped-def]
        return right(layers, logits, torch.roll(labels, 1, dims=1), *rest)

    build.token_loss = shifted


def norm_counts_every_copy() -> None:
    engine.Engine._owned = lambda self: list(self.module.parameters())  # type: ignore[method-assign]
