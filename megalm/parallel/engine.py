"""One step() over DeepSpeed's engines: ZeRO 0 to 3 with one pipeline stage, 1F1B or DualPipeV with more.

A micro-batch is ((tokens, segment_ids, positions, sample_ids), (labels, loss_mask)); all are [batch, seq] but
sample_ids, which is [batch], and the labels of some heads (nn.loss), which are [batch, seq, width].
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn

from megalm.nn.adapter import MAGNITUDE, A, B, adapter_of
from megalm.nn.gate import gates
from megalm.nn.kernels import find_bounds, remember_bounds
from megalm.parallel.device import Stopwatch, fetch, send
from megalm.parallel.groups import Groups, quiet
from megalm.parallel.state import WEIGHT, Piece, State, pieces

MicroBatch = tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
LossFunction = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's trained tokens, nats. grad_norm: global L2 norm before clipping. applied: whether
    the optimizer moved. overflow: it did not since fp16's gradients were too large for the loss scale, which is lower
    now. trained_tokens: tokens the loss was taken over, all ranks."""

    loss: float
    grad_norm: float
    applied: bool
    overflow: bool
    trained_tokens: int


Keep = Callable[[Tensor, Tensor], Iterable[Any]]
"""From logits [batch, seq, width] and a mask [batch, seq] to what is kept of each row."""


class LossOrLogits:
    """The loss; while predictions are asked for, a keeper of what logits say in its place.

    Every engine calls it with the logits of a micro-batch, on the rank that has them, in an order of its own.
    """

    def __init__(self, loss: LossFunction, gather: Callable[[Tensor], Tensor]):
        """gather: the whole vocabulary's logits from this tensor-parallel rank's (nn.layers.Layers.gather)."""
        self._loss = loss
        self.gather = gather
        self.keep: Keep | None = None
        """Set while predictions are asked for: what of a micro-batch's logits is kept."""
        self.kept: dict[int, Any] = {}
        """Sample id -> what was kept of it on this rank."""

    def __call__(self, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """logits: [tokens, width]. targets: (labels, weights), or (sample ids [batch], mask [batch, seq])."""
        if self.keep is None:
            return self._loss(logits, targets)
        ids, mask = targets
        kept = self.keep(logits.unflatten(0, (len(ids), -1)), mask)
        self.kept |= {sample: each for sample, each in zip(ids.tolist(), kept, strict=True) if sample >= 0}
        return logits.new_zeros(())


class StepGuard:
    """Stands between the reduced gradients and the optimizer's update.

    DeepSpeed calls the basic optimizer's step() when the gradients are whole; the guard asks `accept` with their
    norm first and leaves weights and moments alone if it declines. With ZeRO 0 in fp32 it also takes the norm and
    clips, since DeepSpeed's own counts only the first pipeline stage's unsharded parameters there.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, accept: Callable[[float], bool], agree: Callable[[float], float]
    ):
        """agree: one norm of those of all ranks, which may differ in their last bit between copies of the model."""
        self.accept = accept
        self.agree = agree
        self.norm: Callable[[], float] | None = None
        self.clip: Callable[[float], None] | None = None
        self.declined = False
        self.seen: float | None = None
        """The norm of this step's gradients, once the optimizer was called."""
        self._verdict: bool | None = None
        self._step = optimizer.step
        optimizer.step = self._guarded  # type: ignore[method-assign]

    def open(self) -> None:
        """Start a new step: ZeRO may call the optimizer once per parameter group, under one verdict."""
        self._verdict, self.declined, self.seen = None, False, None

    def _guarded(self, *args: Any, **kwargs: Any) -> Any:
        assert self.norm is not None
        if self._verdict is None:
            self.seen = self.agree(self.norm())
            self._verdict = self.accept(self.seen)
            self.declined = not self._verdict
            if self._verdict and self.clip:
                self.clip(self.seen)
        return self._step(*args, **kwargs) if self._verdict else None


class Engine(ABC):
    """The model, its optimizer and its layout, driven one global step at a time."""

    def __init__(
        self,
        engine: Any,
        groups: Groups,
        guard: StepGuard,
        device: torch.device,
        gradient_clipping: float,
        loss: LossOrLogits,
    ):
        self.engine = engine
        self._loss = loss
        self.groups = groups
        self.device = device
        self._guard = guard
        self._clipping = gradient_clipping
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        self._scaler = scaler if getattr(scaler, "dynamic", False) else None
        if self._scaler:
            self._scaler.raise_error_at_min_scale = False  # in a sentence of its own
        if engine.zero_optimization_stage() == 0:
            guard.norm, guard.clip = self._gradient_norm, self._clip
        else:
            guard.norm = lambda: float(engine.optimizer._global_grad_norm)
        self._work = Stopwatch(device)
        self.note: Callable[[str], None] = lambda at: None
        """Told what this rank does from now on, for who watches it."""
        self.state = State(engine)
        self.num_parameters = self._count()
        self._gates = gates(self.module)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, head_only: bool = False) -> StepResult:
        """Forward, backward and update over one rank's share of a global batch.

        head_only: what is not in a head has no gradient and keeps its place (optim.parameters, nn.gate).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0 if head_only and not group["head"] else learning_rate * group["rate_scale"]
        for gate in self._gates:
            gate.is_open = not head_only
        self._guard.open()
        self.note("counting the tokens of the step")
        weighted, tokens = self._weigh(micro_batches, len(micro_batches))
        lower = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        loss = self._train(weighted)
        # Where the gradients are not finite, DeepSpeed does not call the optimizer.
        norm = float(self.engine.get_global_grad_norm()) if self._guard.seen is None else self._guard.seen
        applied = self.engine.was_step_applied() and not self._guard.declined
        overflow = lower and not math.isfinite(norm)
        return StepResult(loss(), norm, applied, overflow, int(tokens()))

    def own_seconds(self) -> float:
        """What this rank's forward passes took since it was last asked: work that waits for no data-parallel rank."""
        return self._work.take()

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Mean loss over the tokens of `micro_batches` on all ranks, in nats, and their number."""
        self.note("evaluation")
        padded = self._padded(micro_batches)
        weighted, tokens = self._weigh(padded, len(padded))
        return self._forward(weighted), int(tokens())

    def predict(self, micro_batches: Sequence[MicroBatch]) -> dict[int, np.ndarray]:
        """Logits [seq, width] fp32 of every row of `micro_batches` on all ranks, by sample id, in order; on rank 0,
        nothing on the others. Every rank calls it.

        Rows of padding (sample id -1) are left out. For heads of few classes, since all of it goes through host memory.
        """
        kept = self._kept(micro_batches, lambda logits, mask: logits.float().cpu().numpy())
        return _joined(self.groups.gather_to_main(kept))

    def next_tokens(self, micro_batches: Sequence[MicroBatch], vocab_size: int) -> dict[int, int]:
        """The likeliest of `vocab_size` ids to follow the one position of each row that its mask marks, of all rows of
        `micro_batches` on all ranks, by sample id; the same on every rank. Every rank calls it."""

        def likeliest(logits: Tensor, mask: Tensor) -> list[int]:
            asked = self._loss.gather(logits[torch.arange(len(mask)), mask.argmax(dim=1)])
            return asked[:, :vocab_size].argmax(dim=-1).tolist()

        return _joined(self.groups.gather(self._kept(micro_batches, likeliest)))

    def _kept(self, micro_batches: Sequence[MicroBatch], keep: Keep) -> dict[int, Any]:
        """What is kept of a pass over `micro_batches`, on one rank of those that have the same."""
        self.note("evaluation")
        self._loss.keep, self._loss.kept = keep, {}
        batches = []
        for inputs, (_, mask) in self._padded(micro_batches):
            here = self._send(inputs)
            batches.append((here, (here[3], send(mask, self.device))))
        self._forward(batches)
        self._loss.keep = None
        return self._loss.kept if self.groups.tensor_rank == 0 else {}

    def _padded(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """With as many blank ones behind them as an evaluation needs."""
        blank = [
            ((*inputs[:3], torch.full_like(inputs[3], -1)), (labels, torch.zeros_like(mask)))
            for inputs, (labels, mask) in micro_batches[:1]
        ]
        return [*micro_batches, *(blank * (-len(micro_batches) % self._evaluation_round()))]

    @property
    def weight_dtype(self) -> str:
        """Of the forward pass's weights: float32, bfloat16 or float16."""
        return str(next(self.module.parameters()).dtype).removeprefix("torch.")

    def pieces(self, layer_names: Sequence[str], *, owned: bool = True) -> Iterator[Piece]:
        """This rank's part of the training state. owned: over all ranks each number of the model appears once;
        otherwise all that this rank holds. Views, valid until the next step."""
        return pieces(self.state, self._named(layer_names, owned), self.groups, owned=owned)

    @torch.no_grad()
    def set_magnitudes(self) -> None:
        """Start DoRA's magnitudes at the row norms of the weights that are there now, rounded as the forward pass sees
        them. All ranks call it.

        The sums are fp64, so that how a layout cuts the rows does not show in them.
        """
        for module in self.module.modules():
            adapter = adapter_of(module)
            if adapter is None or not adapter.directional:
                continue
            magnitude = module.get_parameter(MAGNITUDE)
            parts = [module.get_parameter(name) for name in ("weight", A, B)]
            with deepspeed.zero.GatheredParameters(parts, enabled=hasattr(magnitude, "ds_id")):
                norms = adapter.row_norms(module, dtype=torch.float64).to(magnitude.dtype)
            held = self.state.stretch(magnitude)
            if held is not None:
                start, tensors = held
                tensors[WEIGHT].copy_(norms[start : start + tensors[WEIGHT].numel()])
        self.state.publish()

    def _weigh(self, micro_batches: Sequence[MicroBatch], count: int) -> tuple[list[MicroBatch], Callable[[], float]]:
        """Turn each loss mask into weights under which the engine's averaging over micro-batches and ranks gives
        the sum over trained tokens divided by their global number; and that number."""
        total = send(torch.stack([mask.sum() for _, (_, mask) in micro_batches]).sum().double(), self.device)
        dist.all_reduce(total, group=self.groups.data_group)
        scale = count * self.groups.layout.data / total.clamp(min=1)
        weighted = []
        for inputs, (labels, mask) in micro_batches:
            weights = (send(mask, self.device) * scale).float()
            weighted.append((self._send(inputs), (send(labels, self.device), weights)))
        return weighted, fetch(total)

    def _send(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A micro-batch's inputs on the device, and where its segments start, which attention there would wait for."""
        tokens, segments, positions, samples = (send(x, self.device) for x in inputs)
        if segments is not inputs[1]:
            remember_bounds(segments, send(find_bounds(inputs[1]), self.device))
        return tokens, segments, positions, samples

    def named_weights(self, layer_names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters under their full names, each at one rank of the pipeline, in an order that is the
        same on every data-parallel rank. Under ZeRO 3 a parameter is whole only until the next one is asked for."""
        for name, parameter in self._named(layer_names, owned=True):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name, parameter

    def _named(self, layer_names: Sequence[str], owned: bool) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters under their full names. owned: those of tied layers at one stage only."""
        for name, parameter in full_names(self.module, layer_names):
            if not (owned and getattr(parameter, "ds_pipe_replicated", False)):
                yield name, parameter

    @abstractmethod
    def _train(self, micro_batches: list[MicroBatch]) -> Callable[[], float]:
        """One step; its loss, to be asked for when there is nothing left to give the device."""

    @abstractmethod
    def _forward(self, micro_batches: list[MicroBatch]) -> float: ...

    def _evaluation_round(self) -> int:
        """An evaluation runs a multiple of this many micro-batches."""
        return 1

    def _owned(self) -> list[nn.Parameter]:
        """Parameters of which this rank holds a slice that no other rank of the model counts."""
        return [
            p
            for p in self.module.parameters()
            if not getattr(p, "ds_pipe_replicated", False)
            and (getattr(p, "tensor_model_parallel", False) or self.groups.tensor_rank == 0)
        ]

    def _count(self) -> int:
        """Parameters of the whole model."""
        # Under ZeRO 3 a parameter's own size is that of its partition.
        mine = sum(getattr(p, "ds_numel", p.numel()) for p in self._owned())
        total = torch.tensor(mine, device=self.device)
        dist.all_reduce(total, group=self.groups.model_group)
        return int(total.item())

    def _gradient_norm(self) -> float:
        """L2 norm over every parameter of the model, each counted once across ranks."""
        owned = [p.grad for p in self._owned() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(owned)) if owned else torch.zeros(1, device=self.device)
        square = norms.double().square().sum()
        dist.all_reduce(square, group=self.groups.model_group)
        return math.sqrt(square.item())

    def _clip(self, norm: float) -> None:
        if self._clipping and norm > self._clipping:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self._clipping / (norm + 1e-6))


class _ZeroEngine(Engine):
    """DeepSpeedEngine: one pipeline stage, ZeRO 0 to 3."""

    def _train(self, micro_batches: list[MicroBatch]) -> Callable[[], float]:
        self.engine.train()
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            self.note(f"forward pass of micro-batch {number}")
            with self._work:
                loss = self._loss(self.engine(inputs), targets)
            self.note(f"backward pass of micro-batch {number}")
            self.engine.backward(loss)
            total += loss.detach()
            if number == len(micro_batches):
                # Before the update, which the host need not wait for: the next step is prepared meanwhile.
                mean = self._mean(total, len(micro_batches))
                self.note("update of the weights")
            self.engine.step()
        return mean

    @torch.no_grad()
    def _forward(self, micro_batches: list[MicroBatch]) -> float:
        self.engine.eval()
        total = torch.zeros((), device=self.device)
        for inputs, targets in micro_batches:
            total += self._loss(self.engine(inputs), targets)
        return self._mean(total, len(micro_batches))()

    def _mean(self, total: Tensor, count: int) -> Callable[[], float]:
        dist.all_reduce(total, group=self.groups.data_group)
        return fetch(total / (count * self.groups.layout.data))


_FROM_BEFORE, _FROM_AFTER = schedule.RecvActivation, schedule.RecvGrad
_INSTRUCTIONS = {
    schedule.LoadMicroBatch: "loading of micro-batch {}",
    schedule.ForwardPass: "forward pass of micro-batch {}",
    schedule.BackwardPass: "backward pass of micro-batch {}",
    schedule.RecvActivation: "pipeline receive of micro-batch {}",
    schedule.SendActivation: "pipeline send of micro-batch {}",
    schedule.RecvGrad: "pipeline receive of the gradient of micro-batch {}",
    schedule.SendGrad: "pipeline send of the gradient of micro-batch {}",
    schedule.ReduceGrads: "sum of the gradients over ranks",
    schedule.ReduceTiedGrads: "sum of tied gradients over stages",
    schedule.OptimizerStep: "update of the weights",
}
"""What a pipeline does, in words; {} is the micro-batch, counted by the instructions of its kind."""


class _PipelineEngine(Engine):
    """DeepSpeed's PipelineEngine or DualPipeVEngine: several stages, ZeRO 0 or 1. It takes the mean loss after the
    update, so that whoever asks for it waits for that."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        ours = {ReduceTiedGrads: lambda engine: self._reduce_tied_gradients()}
        instructions = self.engine._INSTRUCTION_MAP | ours
        self._begun: Counter[type] = Counter()
        self.engine._INSTRUCTION_MAP = {kind: self._noted(kind, right) for kind, right in instructions.items()}
        if hasattr(self.engine.optimizer, "scaled_global_norm"):
            self._take_part_in_all_norms()

    def _noted(self, kind: type, right: Callable[..., Any]) -> Callable[..., Any]:
        """An instruction of the schedule that says which it is before it begins."""
        stages, stage = self.groups.layout.pipeline, self.groups.stage
        _, data, tensor = self.groups.layout.coordinates(self.groups.rank)
        words = _INSTRUCTIONS.get(kind, kind.__name__)
        peer = {_FROM_BEFORE: stage - 1, _FROM_AFTER: stage + 1}.get(kind)
        if peer is not None and not self._is_dualpipev:  # whose stages send in both directions
            words += f" from rank {self.groups.layout.rank(peer % stages, data, tensor)}"

        def instruction(engine: Any, *arguments: Any, **options: Any) -> Any:
            self._begun[kind] += 1
            self.note(words.format(self._begun[kind]))
            if kind is not schedule.ForwardPass:
                return right(engine, *arguments, **options)
            with self._work:
                return right(engine, *arguments, **options)

        return instruction

    def _train(self, micro_batches: list[MicroBatch]) -> Callable[[], float]:
        self._begun.clear()
        loss = self.engine.train_batch(iter(micro_batches))
        self.engine.timers(TRAIN_BATCH_TIMER).reset()  # it would keep the events of every step
        return loss.item

    def _forward(self, micro_batches: list[MicroBatch]) -> float:
        size = self._evaluation_round() if self._is_dualpipev else len(micro_batches)
        rounds = [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]
        losses = [self.engine.eval_batch(iter(each), num_micro_batches=size).item() for each in rounds]
        return sum(losses) / len(losses)

    def _evaluation_round(self) -> int:
        # DualPipeVEngine finds a micro-batch's second half by the number of micro-batches of a training step.
        return self.engine.micro_batches if self._is_dualpipev else 1

    @property
    def _is_dualpipev(self) -> bool:
        return isinstance(self.engine, DualPipeVEngine)

    def _take_part_in_all_norms(self) -> None:
        """Let every stage join as many sums over stages as the one with the most groups of parameters.

        ZeRO's optimizer sums the norm of one group after the other over all stages. Where layers have rates of their
        own, or some are frozen, stages differ in how many groups they have: the others would wait for ever.
        """
        optimizer = self.engine.optimizer
        most = int(self.groups.maximum(len(optimizer.bit16_groups)))

        def norm_of(group: int) -> Tensor:
            there = group < len(optimizer.bit16_groups)
            parameters = optimizer.params_in_partition[group] if there else []
            if optimizer.cpu_offload:
                return optimizer.complete_grad_norm_calculation_for_cpu_offload(parameters)
            return optimizer.get_grad_norm_direct(optimizer.averaged_gradients[group] if there else [], parameters)

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            # One list of the same sums on every stage, combined at once: its norm is the same to the last bit.
            return combine_grad_norm_groups([norm_of(group) for group in range(most)], norm_type=norm_type)

        optimizer.scaled_global_norm = scaled_global_norm

    def _reduce_tied_gradients(self) -> None:
        """Sum the gradients of tied layers over the stages that hold a copy.

        DeepSpeed's own has two faults. It looks for them in weight.grad, where they are not if ZeRO's optimizer
        accumulates them in fp32 beside weights in half precision (fp16, or any with offload). And it leaves the sum
        over data-parallel ranks to what follows, which adds them in an order of its own on each stage: with three
        ranks or more the copies would drift apart, by a bit now and then.
        """
        engine, ranks = self.engine, self.groups.layout.data
        for weight, stages in engine.module.get_tied_weights_and_groups():
            if not weight.requires_grad:
                continue
            if engine.using_bf16_optimizer:
                gradient = weight._hp_grad
            elif engine.zero_optimization():
                gradient = engine.optimizer.get_gradient_for_reduction(weight)
            else:
                gradient = weight.grad
            # Over two ends a sum has one order only. The average over data-parallel ranks then finds equal numbers.
            dist.all_reduce(gradient, group=self.groups.data_group)
            dist.all_reduce(gradient, group=stages)
            gradient /= ranks


def full_names(module: nn.Module, layer_names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model or of a stage of it, by their full names."""
    for name, parameter in module.named_parameters():
        layer, suffix = name.split(".", 1)
        # DeepSpeed keeps tied layers under tied_modules.NAME, all others under their index.
        yield suffix if layer == "tied_modules" else f"{layer_names[int(layer)]}.{suffix}", parameter


def partition(layer: nn.Module, groups: Groups, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Cut a layer's weights over data-parallel ranks, as ZeRO 3 keeps them, so that no rank ever holds all layers
    whole. config: DeepSpeed's. All ranks call it for the same layers in the same order."""
    layer.to(dtype)
    with quiet():
        deepspeed.zero.Init(
            module=layer,
            data_parallel_group=groups.data_group,
            config_dict_or_path=config,
            mpu=groups.grid,
            dtype=dtype,
        )


def create(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    *,
    config: dict[str, Any],
    loss: LossFunction,
    gather: Callable[[Tensor], Tensor],
    device: torch.device,
    gradient_clipping: float,
    accept: Callable[[float], bool],
) -> Engine:
    """Wrap `module` and `optimizer` in the DeepSpeed engine that the layout asks for. gather: as of LossOrLogits."""

    def agree(norm: float) -> float:
        return groups.maximum(norm if math.isfinite(norm) else math.inf, idle=True)

    guard = StepGuard(optimizer, accept, agree)
    kept = LossOrLogits(loss, gather)
    if _is_pipeline(module):
        module.loss_fn = kept  # type: ignore[assignment]
    with quiet():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=None if _is_pipeline(module) else groups.grid
        )
    if isinstance(engine.optimizer, BF16_Optimizer):
        _sum_without_copies(engine.optimizer)
    kind = _PipelineEngine if _is_pipeline(module) else _ZeroEngine
    return kind(engine, groups, guard, device, gradient_clipping, kept)


def _sum_without_copies(optimizer: BF16_Optimizer) -> None:
    """Add each bf16 gradient to its fp32 sum as it is: DeepSpeed widens a copy first, for nearly twice the traffic of a
    GPU's memory."""

    def update(weight: Any, group: int, number: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][number]
        total.add_(weight.grad.view(total.shape))
        weight._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][number] = True
        if clear_lp_grads:
            weight.grad.zero_()

    optimizer._update_hp_grad = torch.no_grad()(update)


def _joined(shares: Sequence[dict[int, Any]]) -> dict[int, Any]:
    """What ranks found, in the order of sample ids."""
    found = {sample: each for share in shares for sample, each in share.items()}
    return {sample: found[sample] for sample in sorted(found)}


def _is_pipeline(module: nn.Module) -> bool:
    return isinstance(module, PipelineModule)
