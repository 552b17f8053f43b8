"""Bugs to plant in a rank, each of which a comparison must catch; and one pretence."""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from megalm.data.packing import Packer
from megalm.nn.dropout import EmbeddingNoise
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

    def swapped(specs, seed, rank, size, *rest):  # type: ignore[no-untyped-def]
        return right(specs, seed, size - 1 - rank, size, *rest)

    build.build_model = swapped


def mean_of_micro_batch_means() -> None:
    """The classic: average each micro-batch's own mean, however few tokens it trains."""

    def weigh(self, micro_batches, count):  # type: ignore[no-untyped-def]
        each = [(inputs, (labels, mask / mask.sum().clamp(min=1))) for inputs, (labels, mask) in micro_batches]
        return each, right(self, micro_batches, count)[1]

    right = engine.Engine._weigh
    engine.Engine._weigh = weigh  # type: ignore[method-assign]


def shifted_labels() -> None:
    right = build.head_loss

    def shifted(head, layers, logits, labels: Tensor, *rest):  # type: ignore[no-untyped-def]
        return right(head, layers, logits, torch.roll(labels, 1, dims=1), *rest)

    build.head_loss = shifted


def norm_counts_every_copy() -> None:
    engine.Engine._owned = lambda self: list(self.module.parameters())  # type: ignore[method-assign]


def a_scaled_gradient() -> None:
    """Of one matrix, by a thousandth."""
    right = engine.create

    def create(module, *args, **options):  # type: ignore[no-untyped-def]
        module.get_parameter("2.feed_forward.down.weight").register_hook(lambda gradient: gradient * 1.001)
        return right(module, *args, **options)

    engine.create = create


def no_reduction_over_data() -> None:
    DeepSpeedEngine.allreduce_gradients = lambda self, *args, **options: None


def no_reduction_of_tied_gradients() -> None:
    engine._PipelineEngine._reduce_tied_gradients = lambda self: None  # type: ignore[method-assign]


def norms_decay() -> None:
    right = build.parameter_groups
    build.parameter_groups = lambda named, decay, decays, *rest: right(named, decay, lambda *parameter: True, *rest)


def a_repeated_sample() -> None:
    """Sample 5 has the content of another window."""
    right = Packer.batch

    def batch(self, rows, sample_ids):  # type: ignore[no-untyped-def]
        rows = [(reader, 0) if number == 5 else (reader, window) for (reader, window), number in zip(rows, sample_ids)]
        return right(self, rows, sample_ids)

    Packer.batch = batch  # type: ignore[method-assign]


def a_loss_of_one_rank() -> None:
    """Each rank reports its own."""
    engine._ZeroEngine._mean = lambda self, total, count: lambda: total.item() / count  # type: ignore[method-assign]


def a_misreported_loss() -> None:
    right = engine._ZeroEngine._mean

    def mean(self, total: Tensor, count: int):  # type: ignore[no-untyped-def]
        loss = right(self, total, count)
        return lambda: loss() * 1.00001

    engine._ZeroEngine._mean = mean  # type: ignore[method-assign]


def no_reduction_of_adapters() -> None:
    """Each rank keeps its share of what a row-parallel projection's lora_A gives."""
    tensor.TensorParallelLayers.reduce = lambda self, x: x  # type: ignore[method-assign]


def magnitudes_of_one() -> None:
    engine.Engine.set_magnitudes = lambda self: None  # type: ignore[method-assign]


def nothing_is_frozen() -> None:
    build.tunings.freeze = lambda named, tuning: None


def one_rate_for_all() -> None:
    build.tunings.rate_scale = lambda name, tuning, num_layers: 1.0


def noise_by_row_of_the_batch() -> None:
    right = EmbeddingNoise.forward
    EmbeddingNoise.forward = lambda self, x, rows, seq: right(self, x, torch.arange(len(rows)), seq)  # type: ignore[method-assign]


def _after_step(meddle: Callable[[engine.Engine], None], count: int) -> None:
    """Call meddle(engine) when `count` steps are done."""
    right, done = engine.Engine.step, 0

    def step(self: engine.Engine, *args: Any) -> engine.StepResult:
        nonlocal done
        result, done = right(self, *args), done + 1
        if done == count:
            meddle(self)
        return result

    engine.Engine.step = step  # type: ignore[method-assign]


def a_drifted_copy() -> None:
    """The last data-parallel rank's copy of one number changes by its last bit."""

    def drift(engine: engine.Engine) -> None:
        if engine.groups.data_rank == engine.groups.layout.data - 1:
            weight = engine.module.get_parameter("0.table.weight").data
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))

    _after_step(drift, 3)


def a_nudged_weight() -> None:
    """One number of step 0 is another, by its last bit, on every rank."""
    right = build.build_model

    def nudged(*args):  # type: ignore[no-untyped-def]
        model = right(*args)
        weight = model.get_parameter("0.table.weight").data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        return model

    build.build_model = nudged


def _forgotten(kind: str) -> None:
    """A moment of one matrix starts anew after the first step."""

    def forget(engine: engine.Engine) -> None:
        for piece in engine.pieces([str(index) for index in range(99)], owned=False):
            if piece.name == "2.feed_forward.down.weight":
                piece.tensors[kind].zero_()

    _after_step(forget, 1)


def a_forgotten_first_moment() -> None:
    _forgotten("exp_avg")


def a_forgotten_second_moment() -> None:
    _forgotten("exp_avg_sq")
