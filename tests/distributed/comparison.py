"""What a layout is held against one process of plain torch by, and how close it must be.

Equal, to the bit: the weights of step 0, the samples of every step, the copies of a number that several ranks hold,
and the loss and gradient norm that they report.

Close: losses and gradient norms of every step, the gradients of the first, weights and moments after the last. The
measure is the relative distance from the same training in fp64 (L2 over a tensor). No arithmetic of p bits can be at
distance 0, and how far it is allowed to be is not chosen: references in the run's precision, which differ only in the
order of their sums (rows shuffled, batches cut into micro-batches of several sizes), are held against fp64 too, and a
layout may be FACTOR times as far as the farthest of them (or as FACTOR roundings of an fp32 number, where they all
happen to hit). A layout sums in yet another order, over ranks and over slices of a matrix product, and so lands at
another distance of the same size; a missing term, a wrong scale or a swapped slice is a thousand times as far in fp32.

What a gradient is allowed, AdamW hands on to the weights, divided by the size of each number's own gradients: where a
number's are far below its tensor's, its rounding is not, and the weight moves by a share of a whole step. Few numbers
decide that distance, and a handful of references may miss them, so in fp32 weights are allowed at least as much
(_handed_on).
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megalm.models.tuning import rate_scale
from megalm.training.config import RunConfig
from tests.distributed.reference import KINDS, Trace, batches, sample_contents, train

FACTOR = 4.0
ROUNDING = 2.0**-24
"""Of an fp32 number, relative."""
ORDERS = {24: None, 12: 1, 8: 2, 6: 3, 4: 4, 3: 5, 2: 6, 1: 7}
"""Micro-batch sizes of the references, every one that a layout may have, and how each shuffles its rows. Fewer would
not do: a gradient far below eps is mostly rounding, AdamW's step multiplies it by learning_rate / eps, and how large
that grows differs between orders of summation by a factor of four."""

Distances = dict[str, dict[str, float]]
"""Quantity -> step or tensor -> relative distance."""


@dataclass
class Expected:
    """What every layout of one config must give."""

    exact: Trace
    """In fp64."""
    tolerance: Distances


def expected(config: RunConfig) -> Expected:
    precision, batch = config.train.precision, config.train.global_batch_size
    exact = train(config, "fp64", batch, keep_start=True)
    others = [
        distances(train(config, precision, micro_batch_size, order), exact)
        for micro_batch_size, order in ORDERS.items()
    ]
    # Steps, and the same tensor in different blocks, differ in what they happen to hit.
    farthest: Distances = defaultdict(lambda: defaultdict(lambda: ROUNDING))
    for other in others:
        for quantity, each in other.items():
            for name, distance in each.items():
                farthest[quantity][_alike(name)] = max(farthest[quantity][_alike(name)], distance)
    tolerance = {
        quantity: {name: FACTOR * farthest[quantity][_alike(name)] for name in each}
        for quantity, each in others[0].items()
    }
    if precision == "fp32":  # in fewer bits roundings are not small beside their gradients, and this is no bound
        for name, distance in _handed_on(config, exact, tolerance["gradient"]).items():
            tolerance["weight"][name] = max(tolerance["weight"][name], distance)
    return Expected(exact, tolerance)


def _handed_on(config: RunConfig, exact: Trace, gradient: dict[str, float]) -> dict[str, float]:
    """How far weights may be after the last step if every step's gradients are as far as `gradient` allows, spread
    evenly over a tensor: each moves a number by learning_rate / (sqrt(v) + eps) of its error, to first order."""
    settings, steps = config.optimizer, len(exact.losses)
    least = ROUNDING * np.linalg.norm([np.linalg.norm(value) for value in exact.end["weight"].values()])
    tiny = ROUNDING * np.linalg.norm([np.linalg.norm(value) for value in exact.first.values()])
    found = {}
    for name, first in exact.first.items():
        error = gradient[name] * max(np.linalg.norm(first), tiny) / (1 - settings.beta1) / np.sqrt(first.size)
        v = exact.end["exp_avg_sq"][name] / (1 - settings.beta2**steps)
        rate = settings.learning_rate * rate_scale(name, config.tuning, config.model.num_layers)
        # A number without any gradient (an id that no row holds) has no error either.
        moved = steps * rate * error * np.linalg.norm(np.where(v > 0, 1 / (np.sqrt(v) + settings.eps), 0))
        found[name] = float(moved / max(np.linalg.norm(exact.end["weight"][name]), least))
    return found


def _alike(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def distances(trace: Trace, exact: Trace) -> Distances:
    steps = range(len(exact.losses))
    found: Distances = {
        "loss": {f"step {i}": _relative(trace.losses[i], exact.losses[i]) for i in steps},
        "gradient norm": {f"step {i}": _relative(trace.norms[i], exact.norms[i]) for i in steps},
        "gradient": _each_relative(trace.first, exact.first),
    }
    return found | {kind: _each_relative(trace.end[kind], exact.end[kind]) for kind in KINDS}


def _each_relative(tensors: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    # A tensor that is zero but for roundings (the gradient of a key's bias is) has no size of its own.
    least = ROUNDING * np.linalg.norm([np.linalg.norm(value) for value in exact.values()])
    return {name: _relative(tensors[name], value, least) for name, value in exact.items()}


def _relative(value: Any, exact: Any, least: float = 0.0) -> float:
    """|value - exact| over |exact|, or over `least` where that is larger."""
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    if value.shape != exact.shape or not np.isfinite(value).all():
        return np.inf
    return float(np.linalg.norm(value - exact) / max(np.linalg.norm(exact), least))


@dataclass
class Share:
    """What one rank saw of a training run."""

    place: tuple[int, int, int]
    """(pipeline, data, tensor) coordinates."""
    samples: list[list[bytes]] = field(default_factory=list)
    sample_ids: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """When ("start", "end") -> parameter -> digest of this rank's slice of the live weights."""
    states: dict[str, list["Stretch"]] = field(default_factory=dict)
    """When ("start", "first", "end") -> everything this rank holds of the training state."""


@dataclass
class Stretch:
    """A parallel.state.Piece to send."""

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    tensor_rank: int
    start: int
    numbers: dict[str, np.ndarray]


def digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()


def record(config: RunConfig, plant: Callable[[], None] | None = None) -> Share:
    """What a rank does: train in the engine of its layout. plant: breaks something first."""
    import deepspeed
    import torch

    from megalm.training.build import build_engine
    from megalm.training.loop import tensors
    from tests.distributed.sabotage import pretend_fp16
    from tests.distributed.training import join

    pretend_fp16()
    if plant:
        plant()
    joined = join(config)
    engine, specs = build_engine(config, joined, torch.device("cpu"), lambda norm: True)
    names = [spec.name for spec in specs]
    share = Share(joined.layout.coordinates(joined.rank))

    def weights() -> dict[str, bytes]:
        found = {}
        for name, parameter in engine._named(names, owned=False):
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[name] = digest(parameter.detach().float().numpy())
        return found

    def state() -> list[Stretch]:
        return [
            Stretch(
                p.name,
                p.shape,
                p.shard_dim,
                p.tensor_rank,
                p.start,
                {k: t.float().numpy().copy() for k, t in p.tensors.items()},
            )
            for p in engine.pieces(names, owned=False)
        ]

    share.weights["start"] = weights()
    share.states["start"] = state()
    for micro_batches in batches(config, joined.data_rank, joined.layout.data):
        share.sample_ids.append([i for batch in micro_batches for i in batch.sample_ids.tolist()])
        share.samples.append([content for batch in micro_batches for content in sample_contents(batch).values()])
        result = engine.step([tensors(batch) for batch in micro_batches], config.optimizer.learning_rate)
        assert result.applied
        share.losses.append(result.loss)
        share.norms.append(result.grad_norm)
        if len(share.losses) == 1:
            share.states["first"] = state()
    share.weights["end"] = weights()
    share.states["end"] = state()
    engine.engine.destroy()
    return share


def whole(shares: list[Share], when: str, kind: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Full tensors from every rank's stretches, and what is wrong: copies that differ, numbers that nobody holds."""
    tensors: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    wrong = []
    for share in shares:
        for stretch in share.states[when]:
            if kind not in stretch.numbers:
                continue
            numbers, dim = stretch.numbers[kind], stretch.shard_dim
            tensor = tensors.setdefault(stretch.name, np.zeros(stretch.shape, np.float32))
            covered = seen.setdefault(stretch.name, np.zeros(stretch.shape, bool))
            views = [tensor, covered]
            if dim is not None:
                views = [np.split(x, _slices(shares), axis=dim)[stretch.tensor_rank] for x in views]
            place, there = np.arange(stretch.start, stretch.start + numbers.size), views[1]
            index = np.unravel_index(place, there.shape)
            again = there[index]
            if not np.array_equal(views[0][index][again].view(np.int32), numbers[again].view(np.int32)):
                wrong.append(f"{kind} of {stretch.name} differs between ranks that hold it")
            views[0][index] = numbers
            there[index] = True
    wrong += [f"{kind} of {name} has numbers that no rank holds" for name, covered in seen.items() if not covered.all()]
    return tensors, wrong


def _slices(shares: list[Share]) -> int:
    return 1 + max(share.place[2] for share in shares)


def problems(shares: list[Share], wanted: Expected) -> tuple[dict[str, list[str]], Distances]:
    """What is wrong with a layout, by the comparison that finds it; and its distances."""
    exact = wanted.exact
    found: dict[str, list[str]] = defaultdict(list)

    # What ranks hold in common.
    for when in ("start", "end"):
        copies: dict[tuple[str, int], set[bytes]] = defaultdict(set)
        cut = {stretch.name: stretch.shard_dim is not None for share in shares for stretch in share.states[when]}
        for share in shares:
            for name, value in share.weights[when].items():
                copies[name, share.place[2] if cut.get(name) else 0].add(value)
        found["copies"] += [f"{when}: {name} differs between ranks" for (name, _), v in copies.items() if len(v) > 1]
    if any((share.losses, share.norms) != (shares[0].losses, shares[0].norms) for share in shares):
        found["copies"].append("ranks report different losses or gradient norms")

    # Samples.
    for step, samples in enumerate(exact.samples):
        got: dict[int, tuple[int, bytes]] = {}
        for share in shares:
            pipeline, data, tensor = share.place
            if len(set(share.sample_ids[step])) != len(share.sample_ids[step]):
                found["samples"].append(f"step {step}: a sample twice on a rank")
            for number, content in zip(share.sample_ids[step], share.samples[step], strict=True):
                if got.setdefault(number, (data, content)) != (data, content):
                    found["samples"].append(f"step {step}: sample {number} on two data-parallel ranks")
        if {number: content for number, (_, content) in got.items()} != samples:
            found["samples"].append(f"step {step}: other samples than {min(samples)} to {max(samples)}")

    # Weights of step 0, live and fp32.
    start, wrong = whole(shares, "start", "weight")
    found["copies"] += wrong
    if set(start) != set(exact.start):
        found["weights of step 0"].append(f"other names: {sorted(set(start) ^ set(exact.start))}")
    for name, value in exact.start.items():
        if name in start and not np.array_equal(start[name], value):
            found["weights of step 0"].append(f"{name} (fp32)")
    dims = {stretch.name: stretch.shard_dim for share in shares for stretch in share.states["start"]}
    for share in shares:
        for name, value in share.weights["start"].items():
            tensor = exact.start[name]
            if (dim := dims[name]) is not None:
                tensor = np.split(tensor, _slices(shares), axis=dim)[share.place[2]]
            if digest(tensor) != value:
                found["weights of step 0"].append(f"{name} on rank {share.place}")

    # Everything that is close.
    trace = Trace(losses=shares[0].losses, norms=shares[0].norms)
    trace.first, wrong = whole(shares, "first", "exp_avg")
    found["copies"] += wrong
    for kind in KINDS:
        trace.end[kind], wrong = whole(shares, "end", kind)
        found["copies"] += wrong
    nothing = np.zeros(0)
    for tensors, theirs in [(trace.first, exact.first), *((trace.end[kind], exact.end[kind]) for kind in KINDS)]:
        for name in theirs:
            tensors.setdefault(name, nothing)
    measured = distances(trace, exact)
    for quantity, each in measured.items():
        for name, distance in each.items():
            if not distance <= wanted.tolerance[quantity][name]:
                found[quantity].append(
                    f"{name} is {distance:.1e} off, more than {wanted.tolerance[quantity][name]:.1e}"
                )
    return {comparison: lines for comparison, lines in found.items() if lines}, measured
