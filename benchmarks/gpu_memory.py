"""The memory that a training step on one GPU will need, found before anything is allocated.

ZeRO 1 in bf16 on one rank: weights in bf16, and fp32 weights, gradient sums and two moments. What the backward pass
keeps of the forward pass is not a formula but what megalm's own layers keep: each runs on tensors without numbers
(torch's FakeTensorMode) and what autograd saves is counted.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from megalm.errors import MegalmError
from megalm.models.decoder import build_model, decoder
from megalm.nn.attention import requirements
from megalm.nn.block import Block
from megalm.nn.kernels import resolve
from megalm.nn.layers import Layers
from megalm.nn.position import alibi_slopes, rotary_frequencies
from megalm.training.config import RunConfig

DTYPE = torch.bfloat16
CHUNK = 0
"""Numbers of fp32 that nn.cross_entropy holds beside the logits: none on a GPU."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    weights: int
    """bf16."""
    master_weights: int
    """fp32, as the next two."""
    gradients: int
    moments: int
    activations: int
    """What the backward pass needs, the logits among it."""
    temporaries: int
    """Beside the activations: at the start of the backward pass, in a block that is recomputed, or in the update,
    whichever makes most."""

    @property
    def total(self) -> int:
        """The peak of a step."""
        return sum(asdict(self).values())


def predict(config: RunConfig, chunk: int = CHUNK) -> Memory:
    """The peak of a step.

    Attention is taken to keep no scores, as flash kernels do; the plain backend keeps them, and is predicted so. Of
    torch's caching allocator, which reserves more than it hands out, nothing is known here.

    Raises MegalmError for a layout or precision it knows nothing of.
    """
    parallel, train = config.parallel, config.train
    if (parallel.zero, parallel.tensor, parallel.pipeline, parallel.offload_optimizer) != (1, 1, 1, False):
        raise MegalmError("memory is predicted for one GPU with parallel.zero 1 and nothing offloaded: set these")
    if train.precision != "bf16" or config.tuning.adapts or config.tuning.freeze:
        raise MegalmError("memory is predicted for bf16 and full training: leave train.precision and tuning alone")
    sizes, kept = _layers(config, parallel.recompute)
    numbers, largest = sum(sizes), max(sizes)
    logits = DTYPE.itemsize * train.micro_batch_size * train.sequence_length * config.model.padded_vocab_size()
    states = [DTYPE.itemsize * numbers, 4 * numbers, 4 * numbers, 8 * numbers]
    activations = sum(kept.values()) + logits
    # The logits' gradient, beside it some of it in fp32, or the gradient of the largest weight in both precisions.
    backward = logits + max(min(4 * chunk, 4 * logits), (DTYPE.itemsize + 4) * largest)
    # What recomputation leaves out comes back one block at a time, by when there are no logits.
    recomputed = _layers(config, "none")[1]["blocks.0"] - kept["blocks.0"] - logits
    # Unfused, the update of a group of parameters makes two fp32 copies of it; by then there are no activations.
    update = 8 * numbers - activations if config.optimizer.implementation == "torch" else 0
    return Memory(*states, activations, max(backward, recomputed, update))


def _layers(config: RunConfig, recompute: str) -> tuple[list[int], dict[str, int]]:
    """Sizes of all parameters, and the bytes that each layer's forward pass keeps."""
    model, train = config.model, config.train
    backend = "plain" if model.attention_backend == "plain" else "sdpa"
    model = model.model_copy(update={"attention_backend": backend, "norm_implementation": "torch"})
    # Its self-check needs numbers; the answer is remembered.
    resolve(backend, requirements(model, device="cpu", dtype=DTYPE, segmented=False,
                                  sequence_length=train.sequence_length))  # fmt: skip
    specs = decoder(model, Layers(), seed=0, segmented=False, recompute=recompute)  # type: ignore[arg-type]
    with torch.device("meta"):
        whole = build_model(specs, seed=None)
    sizes = [weight.numel() for weight in whole.named_weights().values()]
    kept: dict[str, int] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            rows = torch.zeros(train.micro_batch_size, train.sequence_length, dtype=torch.long)
            stream: tuple[Tensor, ...] = (rows, rows, rows, rows[:, 0])
            for spec, layer in zip(specs, whole.children(), strict=True):
                if isinstance(layer, Block) and "blocks.0" in kept:
                    kept[spec.name] = kept["blocks.0"]  # all are alike
                else:
                    kept[spec.name], stream = _kept(layer, stream)
    finally:
        rotary_frequencies.cache_clear()  # they have no numbers
        alibi_slopes.cache_clear()
    return sizes, kept


def _kept(layer: nn.Module, stream: tuple[Tensor, ...]) -> tuple[int, tuple[Tensor, ...]]:
    """Bytes that autograd saves, the layer's own weights left out; and what the layer gives."""
    weights = {name: torch.empty(p.shape, dtype=DTYPE, requires_grad=True) for name, p in layer.named_parameters()}
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    saved: dict[int, Tensor] = {}  # holds them, so that no storage takes the place of another

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = functional_call(layer, weights, (stream,))
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own), out
