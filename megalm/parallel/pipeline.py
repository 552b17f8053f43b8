"""A list of layers as DeepSpeed's pipeline modules, 1F1B or DualPipeV."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from megalm.nn.block import Block
from megalm.nn.init import initialize
from megalm.nn.layers import Layers
from megalm.parallel.groups import Groups, quiet


class Spec(Protocol):
    """What a pipeline needs to know of a layer (models.decoder.LayerSpec has it)."""

    @property
    def name(self) -> str: ...

    @property
    def build(self) -> Callable[[], nn.Module]: ...

    @property
    def tied_to(self) -> str | None: ...


def _ask_for_gradients(layer: nn.Module, inputs: Any, stream: tuple[Tensor, ...]) -> None:
    """A forward hook: hidden states want gradients even where nothing before them is trained, because the engine starts
    each stage's backward pass from the hidden states it sent."""
    if torch.is_grad_enabled() and not stream[0].requires_grad:
        stream[0].requires_grad_()


def _initialized(spec: Spec, layers: Layers, seed: int | None) -> nn.Module:
    module = spec.build()
    if spec.name == "embedding":
        module.register_forward_hook(_ask_for_gradients)
    initialize(module, spec.name, seed, layers.tensor_rank, layers.tensor_size)
    return module


class _Layer(LayerSpec):
    """DeepSpeed's spec over ours. Stages are balanced by counting layers of type Block."""

    def __init__(self, spec: Spec, layers: Layers, seed: int | None):
        super().__init__(Block if spec.name.startswith("blocks.") else nn.Module)
        self.spec, self.layers, self.seed = spec, layers, seed

    def build(self, log: bool = False) -> nn.Module:
        return _initialized(self.spec, self.layers, self.seed)


class _TiedLayer(TiedLayerSpec):
    """An embedding that also lives, as the same parameter kept in step by DeepSpeed, where the head is."""

    def __init__(self, embedding: Spec, layers: Layers, seed: int | None, forward_fn: Callable[..., Any] | None = None):
        super().__init__(embedding.name, nn.Module, forward_fn=forward_fn, tied_weight_attr="table.weight")
        self.spec, self.layers, self.seed = embedding, layers, seed

    def build(self, log: bool = False) -> nn.Module:
        return _initialized(self.spec, self.layers, self.seed)


def _tied_head(head: Spec) -> Callable[[nn.Module, Any], Tensor]:
    """The head's forward over the weight of a tied embedding."""
    module = head.build()

    def forward(embedding: nn.Module, stream: Any) -> Tensor:
        module.tie(embedding)  # type: ignore[operator]
        return module(stream)

    return forward


def pipeline_module(
    specs: Sequence[Spec],
    layers: Layers,
    groups: Groups,
    *,
    schedule: str,
    seed: int | None,
    loss: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor],
) -> PipelineModule:
    """This rank's stage, with weights of step 0. seed: of them; None as for nn.init.initialize."""
    by_name = {spec.name: spec for spec in specs}
    sources = {spec.tied_to for spec in specs if spec.tied_to}
    entries: list[LayerSpec] = []
    for spec in specs:
        if spec.tied_to:
            entries.append(_TiedLayer(by_name[spec.tied_to], layers, seed, forward_fn=_tied_head(spec)))
        elif spec.name in sources:
            entries.append(_TiedLayer(spec, layers, seed))
        else:
            entries.append(_Layer(spec, layers, seed))
    kind = DualPipeVModule if schedule == "dualpipev" else PipelineModule
    with quiet():
        return kind(entries, topology=groups.topology, loss_fn=loss, partition_method="type:^Block$")
