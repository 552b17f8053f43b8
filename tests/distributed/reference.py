"""One process of plain torch: no DeepSpeed, no megatron-core, no engine of ours. What every layout is held against.

It trains in fp64, and in the precision of a run: fp32, or fp16 and bf16 with fp32 master weights, all of them by the
loop written out here. In fp64 the parts of the model that compute at least in fp32 are replaced by their definitions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.data.batch import Batch
from megalm.data.loader import Loader
from megalm.data.packing import Windows
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, build_model
from megalm.models.tuning import freeze, rate_scale, tuned_decoder
from megalm.nn.init import spec_of
from megalm.nn.layers import Layers
from megalm.nn.norm import RMSNorm
from megalm.tokenizer.load import load as load_tokenizer
from megalm.training.config import RunConfig
from megalm.training.loop import tensors

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass
class Trace:
    """What a training run was, from beginning to end. Tensors are whole, by their full names."""

    samples: list[dict[int, bytes]] = field(default_factory=list)
    """Of each step: sample id -> its tokens, labels, segments, positions."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    start: dict[str, np.ndarray] = field(default_factory=dict)
    """Weights of step 0."""
    first: dict[str, np.ndarray] = field(default_factory=dict)
    """First moments after the first step. They start at zero, so this is (1 - beta1) x the clipped gradient; every
    engine has it, while gradients themselves are gone, cut or scaled when a step is over."""
    end: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By kind: weights (fp32) and both moments after the last step."""


def batches(config: RunConfig, rank: int, size: int) -> Iterator[list[Batch]]:
    """Every step's micro-batches of one data-parallel rank, from the real loader, with the masks of this test."""
    train = config.train
    data = config.data
    samples = Windows(
        data.sources,
        load_tokenizer(data.tokenizer),
        train.sequence_length,
        attend_across_documents=data.attend_across_documents,
    )
    with Loader(
        samples,
        rank=rank,
        size=size,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=config.run.seed,
        shuffle=data.shuffle,
    ) as loader:
        for _ in range(train.steps):
            yield [labelled(masked(batch, train.global_batch_size), config.model) for batch in next(loader)[0]]


def masked(batch: Batch, global_batch_size: int) -> Batch:
    """The batch with a ragged loss mask that depends on sample ids alone.

    Step 0 has a run of empty samples, so that there are empty micro-batches; step 1 has no odd samples, so that there
    are empty data-parallel ranks.
    """
    mask = batch.loss_mask.copy()
    for row, sample in enumerate(batch.sample_ids.tolist()):
        step, place = divmod(sample, global_batch_size)
        mask[row] *= np.random.default_rng(sample).random(mask.shape[1]) < 0.8
        if (step == 0 and place // 8 == 1) or (step == 1 and place % 2 == 1):
            mask[row] = 0.0
    return Batch(batch.tokens, batch.labels, mask, batch.segment_ids, batch.positions, batch.sample_ids)


def labelled(batch: Batch, model: ModelConfig) -> Batch:
    """The batch with labels of the model's head, made of the next ids: any number of classes, a class, or spans."""
    labels, mask = batch.labels, batch.loss_mask
    if model.head == "sequence_classification":
        labels = labels[..., None] >> np.arange(model.num_labels or 0) & 1
    elif model.head == "token_classification":
        labels = labels % model.num_labels
    elif model.head == "question_answering":
        labels, mask = np.zeros((*labels.shape, 3), np.int64), np.zeros_like(mask)
        for row, segments in enumerate(batch.segment_ids):
            for segment in np.unique(segments):
                first, length = int((segments == segment).argmax()), int((segments == segment).sum())
                begin = int(batch.labels[row, first]) % length
                end = begin + int(batch.tokens[row, first]) % (length - begin)
                labels[row, first] = begin, end, length
                mask[row, first] = batch.loss_mask[row, first]
    return Batch(batch.tokens, labels, mask, batch.segment_ids, batch.positions, batch.sample_ids)


def _part_loss(config: RunConfig, layers: Layers, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over positions of weight x loss, by each head's definition."""
    model = config.model
    if model.head == "question_answering":
        said = logits.view(*weights.shape, 2)
        losses = [torch.zeros((), dtype=logits.dtype)]
        for row, first in weights.nonzero().tolist():
            begin, end, length = labels[row, first].tolist()
            here = torch.log_softmax(said[row, first : first + length], dim=0)
            losses.append(-weights[row, first] * (here[begin, 0] + here[end, 1]) / 2)
        return torch.stack(losses).sum() + 0 * logits.sum()
    if model.head == "sequence_classification":
        truth = labels.flatten(0, 1).to(logits.dtype)
        each = -(truth * F.logsigmoid(logits) + (1 - truth) * F.logsigmoid(-logits)).mean(-1)
    elif model.head == "token_classification":
        each = F.cross_entropy(logits, labels.flatten(), reduction="none")
    else:
        each = layers.cross_entropy(logits, labels.flatten())
        if model.z_loss:
            each = each + model.z_loss * layers.logsumexp(logits).square()
    return (each * weights.flatten()).sum()


def sample_contents(batch: Batch) -> dict[int, bytes]:
    """Sample id -> everything that the loader says of it."""
    arrays = (batch.tokens, batch.labels, batch.segment_ids, batch.positions)
    return {
        sample: b"".join(np.ascontiguousarray(array[row]).tobytes() for array in arrays)
        for row, sample in enumerate(batch.sample_ids.tolist())
    }


class Exact(Layers):
    """The factory in fp64, also where the plain one computes in fp32."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def logsumexp(self, logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, dim=-1)


def _exact_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _model(config: RunConfig, layers: Layers, dtype: torch.dtype) -> LayerList:
    settings = config.model.model_copy(update={"attention_backend": "plain"} if dtype == torch.float64 else {})
    segmented = not config.data.attend_across_documents
    specs = tuned_decoder(settings, config.tuning, layers, seed=config.run.seed, segmented=segmented)
    model = build_model(specs, config.run.seed)
    # A run in half precision starts from weights that are rounded to it.
    model.to(DTYPES[config.train.precision])
    _start_magnitudes(model)
    freeze(model.named_weights().items(), config.tuning)
    model.to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.forward = partial(_exact_norm, module)  # type: ignore[method-assign]
    return model.train()


@torch.no_grad()
def _start_magnitudes(model: LayerList) -> None:
    """DoRA's, from the whole weights."""
    named = model.named_weights()
    for name, magnitude in named.items():
        if name.endswith(".lora_magnitude"):
            weight = named[name.replace("lora_magnitude", "weight")]
            magnitude.copy_(weight.double().square().sum(dim=1).sqrt())


def train(
    config: RunConfig, precision: str, micro_batch_size: int, order: int | None = None, keep_start: bool = False
) -> Trace:
    """Train. micro_batch_size: rows at a time, whose gradients are summed. order: shuffles the rows of each step."""
    dtype = DTYPES[precision]
    wide = torch.promote_types(dtype, torch.float32)
    layers = Exact() if dtype == torch.float64 else Layers()
    model, trace = _model(config, layers, dtype), Trace()
    everything = model.named_weights()
    named = {name: p for name, p in everything.items() if p.requires_grad}
    if keep_start:
        trace.start = {name: p.detach().to(torch.float32, copy=True).numpy() for name, p in everything.items()}
    masters = {name: nn.Parameter(p.detach().to(wide, copy=True)) for name, p in named.items()}
    scales = {name: rate_scale(name, config.tuning, config.model.num_layers) for name in named}
    optimizer = _optimizer(config, [(masters[name], spec_of(p).decay, scales[name]) for name, p in named.items()])
    # DeepSpeed's starts there, and stays over a few steps.
    scale = 2.0 ** config.deepspeed["fp16"]["initial_scale_power"] if precision == "fp16" else 1.0
    whole = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": config.train.global_batch_size})}
    )
    for step, [batch] in enumerate(batches(whole, 0, 1)):
        trace.samples.append(sample_contents(batch))
        (inputs, (labels, mask)) = tensors(batch)
        rows = torch.arange(len(labels))
        if order is not None:
            rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(order))
        weights = mask.to(wide) / mask.sum().to(wide)
        sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        loss = torch.zeros((), dtype=wide)
        for part in rows.split(micro_batch_size):
            logits = model(tuple(x[part] for x in inputs))
            part_loss = _part_loss(config, layers, logits, labels[part], weights[part])
            model.zero_grad()
            (part_loss * scale).backward()
            loss += part_loss.detach()
            for name, parameter in named.items():
                sums[name] += parameter.grad.to(wide)  # type: ignore[union-attr]
        for name, master in masters.items():
            master.grad = sums[name] / scale
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters.values()])
        if 0 < config.optimizer.gradient_clipping < norm:
            for master in masters.values():
                master.grad *= config.optimizer.gradient_clipping / (norm + 1e-6)  # as torch and DeepSpeed have it
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(masters[name])
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
        if step == 0:
            trace.first = {name: optimizer.state[p]["exp_avg"].numpy().copy() for name, p in masters.items()}
    trace.end["weight"] = {name: p.detach().to(wide).numpy() for name, p in (everything | masters).items()}
    for kind in KINDS[1:]:
        trace.end[kind] = {name: optimizer.state[p][kind].numpy() for name, p in masters.items()}
    return trace


def _optimizer(config: RunConfig, parameters: list[tuple[nn.Parameter, bool, float]]) -> torch.optim.AdamW:
    """parameters: with whether each decays, and its share of the learning rate."""
    settings = config.optimizer
    return torch.optim.AdamW(
        [
            {
                "params": [p],
                "weight_decay": settings.weight_decay if decay else 0.0,
                "lr": settings.learning_rate * scale,
            }
            for p, decay, scale in parameters
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
