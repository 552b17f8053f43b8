"""The memory that a training step will need on a GPU, found before anything is allocated, and what follows from it.

ZeRO 1 in bf16: weights in bf16 and fp32 sums of their gradients, whole on every rank, and a rank's share of fp32
weights and two moments. What the backward pass keeps of the forward pass is not a formula but what megalm's own layers
keep: each runs on tensors without numbers (torch's FakeTensorMode) and what autograd saves is counted.
"""

from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from megalm.errors import MegalmError
from megalm.metrics.meters import format_bytes
from megalm.models.decoder import build_model, decoder
from megalm.nn.attention import requirements
from megalm.nn.block import Block
from megalm.nn.config import Recompute
from megalm.nn.kernels import resolve
from megalm.nn.layers import Layers
from megalm.nn.position import alibi_slopes, rotary_frequencies
from megalm.training.config import RunConfig

ROOM = 0.9
"""Share of a GPU's memory that a prediction may fill: on an H100 torch reserved 6 % more than was predicted, and
libraries take some."""
DTYPE = torch.bfloat16
CHUNK = 2 * 2**19
"""Numbers of fp32 that nn.cross_entropy holds at a time beside logits on a CPU. On a GPU one kernel reads them."""
BUCKET = 500_000_000
"""Numbers from which on DeepSpeed sums gradients over ranks in place. It copies several groups of fewer into one."""


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


def choose_recompute(config: RunConfig, data_parallel: int, memory: int | None) -> tuple[Recompute, int | None]:
    """What a run of `data_parallel` ranks takes for parallel.recompute, and the bytes that its step is predicted to
    take at the peak, if this is known.

    memory: bytes of the GPU that has least; None for CPUs. config.model.attention_backend is best the one that `auto`
    resolves to, and vocab_size must be filled in. Raises MegalmError if `auto` finds none that fits.
    """
    wanted, train = config.parallel.recompute, config.train
    if memory is None or config.unpredicted():
        return "none" if wanted == "auto" else wanted, None
    if wanted != "auto":
        return wanted, predict(config, data_parallel).total
    for recompute in get_args(Recompute):
        predicted = predict(config.with_recompute(recompute), data_parallel).total
        if predicted <= ROOM * memory:
            return recompute, predicted
    smaller = "lower train.micro_batch_size, " if train.micro_batch_size > 1 else ""
    raise MegalmError(
        f"a step is predicted to take {format_bytes(predicted)} even with parallel.recompute full, and of the "
        f"{format_bytes(memory)} that a GPU here has {ROOM:.0%} may be filled: {smaller}start more ranks, or cut the "
        "model over ranks with parallel.tensor and parallel.recompute full"
    )


def predict(config: RunConfig, data_parallel: int = 1, *, on_cpu: bool = False) -> Memory:
    """The peak of a step on each of `data_parallel` ranks. on_cpu: of CPUs, for which a prediction can be measured.

    The attention backends plain and sdpa are taken to keep what they do keep, scores or masks, and all others, `auto`
    among them, to keep neither, as flash kernels do. What train.compile saves is not taken off. Of torch's caching
    allocator, which reserves more than it hands out, nothing is known here.

    Raises MegalmError for a layout or precision it knows nothing of.
    """
    parallel = config.parallel
    if why := config.unpredicted():
        raise MegalmError(f"memory is not predicted with {why}: change that")
    if parallel.recompute == "auto":
        raise MegalmError("memory is not predicted with parallel.recompute auto: set it to none, selective or full")
    sizes, kept, logits = _layers(config, parallel.recompute)
    numbers, largest = sum(sizes), max(sizes)
    share = -(-numbers // data_parallel)
    activations = sum(kept.values()) + logits
    # The logits' gradient (z-loss has one of its own), beside it the gradient of the largest weight. A CPU widens that
    # to sum it, and before that some of the logits.
    backward = logits * (2 if config.model.z_loss else 1)
    backward += max(4 * min(CHUNK, logits), (DTYPE.itemsize + 4) * largest) if on_cpu else DTYPE.itemsize * largest
    recomputed = 0
    if parallel.recompute != "none":
        # What recomputation leaves out comes back one block at a time, by when there are no logits.
        recomputed = _layers(config, "none")[1]["blocks.0"] - kept["blocks.0"] - logits
    # By the time of these there are no activations. Unfused, the update of a group makes two fp32 copies of it.
    reduction = 4 * numbers if numbers <= BUCKET else 0
    update = 8 * share if config.optimizer.implementation == "torch" else 0
    return Memory(
        weights=DTYPE.itemsize * numbers,
        master_weights=4 * share,
        gradients=4 * numbers,
        moments=8 * share,
        activations=activations,
        temporaries=max(backward, recomputed, max(reduction, update) - activations),
    )


def _layers(config: RunConfig, recompute: Recompute) -> tuple[list[int], dict[str, int], int]:
    """Sizes of all parameters; the bytes that each layer's forward pass keeps; and those of the logits."""
    model, train = config.model, config.train
    backend = "plain" if model.attention_backend == "plain" else "sdpa"
    changes: dict[str, Any] = {"attention_backend": backend, "norm_implementation": "torch"}
    segmented = config.segmented
    if model.attention_backend not in ("plain", "sdpa"):  # no mask is a tensor
        segmented, changes["sliding_window"] = False, None
    model = model.model_copy(update=changes)
    # Its self-check needs numbers; the answer is remembered.
    needs = requirements(model, device="cpu", dtype=DTYPE, segmented=segmented, sequence_length=train.sequence_length)
    try:
        resolve(backend, needs)
    except MegalmError as error:  # of this machine's CPU, on which the run may not depend
        raise RuntimeError(f"attention {backend} does not work on the CPU here") from error
    specs = decoder(model, Layers(), seed=0, segmented=segmented, recompute=recompute)
    with torch.device("meta"):
        whole = build_model(specs, seed=None)
    sizes = [weight.numel() for weight in whole.named_weights().values()]
    kept: dict[str, int] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            rows = torch.zeros(train.micro_batch_size, train.sequence_length, dtype=torch.long)
            stream: Any = (rows, rows, rows, rows[:, 0])
            for spec, layer in zip(specs, whole.children(), strict=True):
                if isinstance(layer, Block) and "blocks.0" in kept:
                    kept[spec.name] = kept["blocks.0"]  # all are alike
                else:
                    kept[spec.name], stream = _kept(layer, stream)
    finally:
        rotary_frequencies.cache_clear()  # they have no numbers
        alibi_slopes.cache_clear()
    return sizes, kept, stream.untyped_storage().nbytes()


def _kept(layer: nn.Module, stream: Any) -> tuple[int, Any]:
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
