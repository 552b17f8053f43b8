"""The composition root: the one place that joins the rooms into a run."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint.saver import Saver
from megalm.config import dump
from megalm.data.examples import Rows
from megalm.data.loader import Loader, held_out_batches, held_out_samples
from megalm.errors import MegalmError, reason
from megalm.metrics.meters import format_bytes
from megalm.models import tuning as tunings
from megalm.models.decoder import LayerSpec, build_model
from megalm.nn import cross_entropy, float8
from megalm.nn.attention import requirements
from megalm.nn.block import Block
from megalm.nn.config import Recompute
from megalm.nn.init import spec_of
from megalm.nn.kernels import Requirements, Shape, fastest, measure, resolve, serving, traces
from megalm.nn.loss import head_loss
from megalm.nn.norm import resolve_norm
from megalm.optim.adamw import build_optimizer, resolve_implementation
from megalm.optim.parameters import parameter_groups
from megalm.parallel import deepspeed_config, engine, groups, pass_through
from megalm.parallel import device as devices
from megalm.parallel.engine import Engine
from megalm.parallel.groups import Groups
from megalm.parallel.pipeline import pipeline_module
from megalm.sft.answers import Answers
from megalm.sft.heads import HeadTask
from megalm.sft.scoring import Scorer
from megalm.sft.text import ConversationTask
from megalm.training import preflight, resume
from megalm.training.callbacks.anomalies import Anomalies
from megalm.training.callbacks.checkpoints import Checkpoints
from megalm.training.callbacks.evaluation import Evaluation
from megalm.training.callbacks.garbage import GarbageCollection
from megalm.training.callbacks.metrics import Metrics
from megalm.training.callbacks.selection import Selection
from megalm.training.callbacks.signals import Signals
from megalm.training.callbacks.stragglers import Stragglers
from megalm.training.config import RunConfig
from megalm.training.lock import Lock
from megalm.training.loop import tensors
from megalm.training.memory import choose_recompute
from megalm.training.plan import Plan
from megalm.training.run import Run
from megalm.training.samples import open_samples
from megalm.training.whereabouts import Whereabouts

logger = logging.getLogger(__name__)

MEASURED = ("cuda",)
"""Devices on which the fastest attention kernel is found by measuring; on a CPU the order of kernels is known."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    config: RunConfig,
    joined: Groups,
    device: torch.device,
    accept: Callable[[float], bool],
    *,
    draw: bool = True,
) -> tuple[Engine, list[LayerSpec]]:
    """This rank's part of the model at step 0, in the engine of its layout; and the whole model's layers.

    draw: False leaves weights that are not numbers for a checkpoint to fill; to draw those of a large model takes long.
    """
    model, tuning, parallel, train = config.model, config.tuning, config.parallel, config.train
    assert parallel.recompute != "auto", "it is chosen before anything is built"
    joined.decide(lambda: tunings.check(tunings.shapes(model, tuning), tuning, tied=model.is_tied))
    layers = joined.layers(sequence_parallel=parallel.sequence_parallel)
    specs = tunings.tuned_decoder(
        model,
        tuning,
        layers,
        seed=config.run.seed,
        segmented=config.segmented,
        recompute=parallel.recompute,
    )

    def loss(logits: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        # What is held out is measured in nats per token, by nothing else.
        z_loss = model.z_loss if torch.is_grad_enabled() else 0.0
        return head_loss(model.head, layers, logits, *targets, z_loss)

    seed = config.run.seed if draw else None
    accumulation = joined.layout.accumulation(train.global_batch_size, train.micro_batch_size)
    settings = deepspeed_config.derive(
        parallel,
        precision=train.precision,
        micro_batch_size=train.micro_batch_size,
        accumulation=accumulation,
        data_parallel=joined.layout.data,
        gradient_clipping=config.optimizer.gradient_clipping,
        largest_bucket=model.num_parameters() // (parallel.tensor * parallel.pipeline)
        + 2 * model.padded_vocab_size() * model.hidden_size // parallel.tensor,
        extra=config.deepspeed,
    )
    if config.deepspeed:
        joined.decide(lambda: pass_through.check(settings, joined.grid))
    if parallel.pipeline > 1:
        module: torch.nn.Module = pipeline_module(
            specs, layers, joined, schedule=parallel.pipeline_schedule, seed=seed, loss=loss
        )
    else:
        dtype = DTYPES[train.precision]
        # Layer by layer: all ranks of a machine together may not have room for the whole model in fp32.
        if parallel.zero == 3:
            finish = partial(engine.partition, groups=joined, config=settings, dtype=dtype)
        else:
            finish = partial(torch.nn.Module.to, device=device, dtype=dtype)
        module = build_model(specs, seed, layers.tensor_rank, layers.tensor_size, finish)
    blocks = [layer for layer in module.modules() if isinstance(layer, Block)]
    if train.fp8:
        for block in blocks:
            float8.convert(block, device)
    if config.compiles(device.type):
        needs = attention_needs(config, device)
        attention = resolve(model.attention_backend, needs)
        for block in blocks:
            block.compile_training(device, attention if traces(attention, needs) else None)
    named = list(engine.full_names(module, [spec.name for spec in specs]))
    tunings.freeze(named, tuning)
    decayed = parameter_groups(
        named,
        config.optimizer.weight_decay,
        lambda name, p: spec_of(p).decay,
        lambda name, p: tunings.rate_scale(name, tuning, model.num_layers),
        lambda name, p: tunings.is_head(name),
    )
    _require_work_for_all(joined, bool(decayed))
    optimizer = build_optimizer(decayed, config.optimizer, device.type, parallel.offload_optimizer)
    built = engine.create(
        module,
        optimizer,
        joined,
        config=settings,
        loss=loss,
        gather=layers.gather,
        device=device,
        gradient_clipping=config.optimizer.gradient_clipping,
        accept=accept,
    )
    if tuning.method == "dora":
        built.set_magnitudes()
    return built, specs


def _require_work_for_all(joined: Groups, trains: bool) -> None:
    """Refuse a pipeline in which a rank trains nothing: DeepSpeed's optimizers can not be empty."""
    everyone = joined.gather(trains)
    if not all(everyone):
        stages = sorted({joined.layout.coordinates(rank)[0] for rank, works in enumerate(everyone) if not works})
        raise MegalmError(
            f"tuning leaves pipeline stage {stages[0]} nothing to train: freeze less, or lower parallel.pipeline",
            echo=joined.rank > 0,
        )


def build(planned: Plan, kind: devices.Kind, whereabouts: Whereabouts | None = None) -> Run:
    """Everything a run needs, with its weights and data at the checkpoint it continues from or at step 0.

    kind: what parallel.device chose, before this module was imported. whereabouts: where a watchdog looks.

    Raises MegalmError for files that are missing or do not belong together.
    """
    config = planned.config
    whereabouts = whereabouts or Whereabouts()
    whereabouts.note("joining the other ranks")
    device = devices.local(kind)
    devices.require_precision(config.train.precision)
    if config.train.deterministic:
        devices.require_determinism()
    if config.train.fp8:
        float8.require(device)
    groups.start(device, groups.WATCHED if whereabouts.are_watched else groups.ALONE)
    joined = groups.create(planned.layout)
    lock = Lock(Path(config.run.directory))

    def begin() -> tuple[Path | None, dict[str, Any] | None, str | None]:
        lock.acquire()
        found = resume.find(config)
        if found is None:
            return None, None, None
        manifest = checkpoints.read(found)
        resume.check(manifest, planned, str(found))
        return found, manifest.data, manifest.config["model"].get("attention_backend")

    found, state, attention = joined.decide(begin)
    fitness = preflight.examine(planned, joined, device, whereabouts) if config.run.preflight else None
    if config.compiles(device.type):
        whereabouts.note("trying torch.compile")
        planned = _without_broken_compiler(planned, joined, devices.compiler_problem(device))
    whereabouts.note("measuring attention kernels")
    config, measured = choose_attention(planned.config, joined, device, attention)
    planned = replace(planned, config=config)
    whereabouts.note("predicting the memory of a step")
    planned, recompute, predicted = _with_recompute(planned, joined, device, devices.memory(device))
    config = planned.config
    whereabouts.note("building the model and opening the data")
    samples = open_samples(config, planned.tokenizer, planned.task, decide=joined.decide)
    loader = Loader(
        samples,
        rank=joined.data_rank,
        size=planned.layout.data,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        prefetch=config.data.prefetch,
        state=state,
        allowed=config.checkpoint.allow_changes,
    )
    source = None if found else resume.open_start(planned)
    model, train, logging = config.model, config.train, config.logging
    anomalies = Anomalies(train.on_nan, train.on_spike, train.spike_factor, train.max_anomalies)
    adds = config.tuning.adapts or model.head != "language_model"  # what another model may not have
    filled = found is not None or (source is not None and not adds)
    built, specs = build_engine(config, joined, device, anomalies.accept, draw=not filled)
    sizes = {name: math.prod(shape) for name, shape in tunings.shapes(model, config.tuning).items()}
    assert built.num_parameters == sum(sizes.values()), "a weight is missing"
    names = [spec.name for spec in specs]
    held_out, scorers = _held_out(planned, joined)
    facts = _facts(planned, device, sizes)
    facts["attention"] += measured
    facts["recompute"] = recompute
    if fitness:
        facts["preflight"] = fitness.summary
    _require_same_kernels(joined, facts)
    run = Run(
        planned,
        joined,
        built,
        lock=lock,
        saver=Saver(
            resume.saved_numbers(((piece.name, piece.count) for piece in built.pieces(names)), config.tuning),
            pinned=device.type == "cuda" and not config.parallel.offload_optimizer,
            asynchronous=config.checkpoint.asynchronous,
        ),
        beside=joined.beside(),
        layer_names=names,
        held_out=held_out,
        loader=loader,
        facts=facts,
        whereabouts=whereabouts,
        checkpoint_bytes=4 * resume.saved_numbers(sizes.items(), config.tuning),
        # In this order each step: judge, listen, measure, select, write down, save.
        callbacks=[
            anomalies,
            Signals(),
            Stragglers(logging.stragglers_every),
            Evaluation(
                config.evaluate.every,
                _held_out_bytes(planned, joined, held_out),
                scorers,
                config.evaluate.epochs * loader.epoch,
            ),
            *([Selection(config.evaluate)] if config.evaluate.selects else []),
            Metrics(logging, device, predicted),
            Checkpoints(config.checkpoint.every),
            GarbageCollection(logging.garbage_collection_every),
        ],
    )
    built.note = whereabouts.note
    if found:
        whereabouts.note(f"reading {found.name}")
        resume.restore(run, found)
    elif source:
        resume.begin(run, source)
    if isinstance(samples, Rows):
        for examples in samples.sets:
            run.say(examples.report)
    for warning in fitness.warnings if fitness else []:
        run.say(f"warning: {warning}")
    if device.type == "cpu" and train.precision == "bf16" and not devices.multiplies_bf16():
        run.say(
            "warning: this CPU has no instructions for bf16, which takes it several times as long as fp32: set "
            "train.precision to fp32"
        )
    if loader.restarted:
        run.say(f"the samples start anew from the first: {loader.restarted} changed, which is allowed")
    if run.is_main:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "config.yaml").write_text(dump(config))
    return run


def _without_broken_compiler(planned: Plan, joined: Groups, problem: str | None) -> Plan:
    """The plan; without train.compile `auto` if torch.compile does not work on some rank. problem: of this one. All
    ranks call it.

    Raises MegalmError on all ranks if train.compile is true.
    """
    found = [(rank, why) for rank, why in enumerate(joined.gather(problem)) if why is not None]
    if not found:
        return planned
    rank, why = found[0]
    config = planned.config
    if config.train.compile is True:
        raise MegalmError(
            f"train.compile does not work on rank {rank} ({why}), or leave train.compile out", echo=joined.rank > 0
        )
    if joined.rank == 0:
        logger.warning("train.compile: auto leaves it out, for it does not work on rank %d (%s)", rank, why)
    without = config.train.model_copy(update={"compile": False})
    return replace(planned, config=config.model_copy(update={"train": without}))


def choose_attention(
    config: RunConfig, joined: Groups, device: torch.device, kept: str | None = None
) -> tuple[RunConfig, str]:
    """The config with the kernel that model.attention_backend `auto` takes on a GPU, the same on all ranks, and words
    on the choice. kept: what a run that goes on computed with until now. All ranks call it.

    Elsewhere and under train.deterministic nothing is measured, because two measurements may end in two choices.
    """
    if config.model.attention_backend != "auto" or device.type not in MEASURED or config.train.deterministic:
        return config, ""
    needs = attention_needs(config, device)
    everyone = joined.gather(serving(needs))
    # plain holds the scores of all pairs: it serves where nothing else does
    names = [name for name in everyone[0] if all(name in others for others in everyone) and name != "plain"]
    if len(names) < 2:
        return config, ""

    def choose() -> tuple[str, str]:
        if kept in names:
            return str(kept), "; as until now"
        model, tensor = config.model, config.parallel.tensor
        times = measure(
            names,
            needs,
            Shape(
                batch=config.train.micro_batch_size,
                seq=config.train.sequence_length,
                heads=model.num_attention_heads // tensor,
                kv_heads=max(1, model.key_value_heads // tensor),
                window=model.sliding_window or 0,
            ),
        )
        devices.forget(device)
        if not times:
            return names[0], ""
        inside = [name for name in times if traces(name, needs)] if config.compiles(device.type) else None
        found = ", ".join(f"{name} {1000 * its:.2f} ms" for name, its in times.items())
        return fastest(times, inside), f"; measured {found}"

    backend, words = joined.decide(choose)
    model = config.model.model_copy(update={"attention_backend": backend})
    return config.model_copy(update={"model": model}), words


def _with_recompute(
    planned: Plan, joined: Groups, device: torch.device, memory: int | None
) -> tuple[Plan, str, int | None]:
    """The plan with what parallel.recompute `auto` takes, the same on all ranks; what to say of it; and the predicted
    peak of a step in bytes, if it is known. memory: bytes of this rank's GPU, None for a CPU. All ranks call it.

    Raises MegalmError on all ranks if `auto` finds nothing that fits into the smallest GPU.
    """
    least = min((size for size in joined.gather(memory) if size is not None), default=None)

    def choose() -> tuple[Recompute, int | None]:
        attention = resolve(planned.config.model.attention_backend, attention_needs(planned.config, device))
        model = planned.config.model.model_copy(update={"attention_backend": attention})
        try:
            return choose_recompute(planned.config.model_copy(update={"model": model}), planned.layout.data, least)
        except MegalmError:
            raise
        except Exception as error:  # of a torch whose FakeTensorMode does otherwise: other ranks wait for an answer
            wanted = planned.config.parallel.recompute
            why = f"the memory of a step could not be predicted ({reason(error)})"
            if wanted == "auto":
                raise MegalmError(f"{why}: set parallel.recompute to none, selective or full") from error
            logger.warning("%s", why)
            return wanted, None

    recompute, predicted = joined.decide(choose)
    said: str = recompute
    if predicted and least:
        said += f", {format_bytes(predicted)} predicted at the peak of a step, of {format_bytes(least)}"
    return replace(planned, config=planned.config.with_recompute(recompute)), said, predicted


def _held_out(planned: Plan, joined: Groups) -> tuple[dict[str, list[engine.MicroBatch]], dict[str, Scorer | Answers]]:
    """This rank's micro-batches of every held-out corpus, by the shortest end of its path that tells it apart; and what
    scores them, where the task has a head of its own or the model writes answers."""
    config, sources = planned.config, planned.config.data.held_out
    batches: dict[str, list[engine.MicroBatch]] = {}
    scorers: dict[str, Scorer | Answers] = {}
    for name, source in zip(_short_names([source.path for source in sources]), sources, strict=True):
        samples = open_samples(config, planned.tokenizer, planned.task, [source], joined.decide)
        found = held_out_batches(
            samples,
            rank=joined.data_rank,
            size=planned.layout.data,
            micro_batch_size=config.train.micro_batch_size,
            sequences=config.evaluate.sequences,
        )
        batches[name] = [tensors(batch) for batch in found]
        if isinstance(planned.task, HeadTask):
            assert isinstance(samples, Rows)
            scorers[name] = Scorer(planned.task, samples, held_out_samples(samples, config.evaluate.sequences))
        elif config.evaluate.max_new_tokens:
            assert config.task and isinstance(planned.task, ConversationTask) and isinstance(samples, Rows)
            scorers[name] = Answers(
                config.task.kind,
                planned.task,
                samples,
                held_out_samples(samples, config.evaluate.sequences),
                rank=joined.data_rank,
                size=planned.layout.data,
                micro_batch_size=config.train.micro_batch_size,
                sequence_length=config.train.sequence_length,
                max_new_tokens=config.evaluate.max_new_tokens,
            )
    return batches, scorers


def _held_out_bytes(planned: Plan, joined: Groups, held_out: dict[str, list[engine.MicroBatch]]) -> dict[str, int]:
    """Bytes of the text that every corpus's evaluated tokens stand for, on all ranks; nothing where labels are classes.
    All ranks call it."""
    if not held_out or planned.config.model.head != "language_model":
        return {}
    counts = torch.tensor(planned.tokenizer.byte_counts())
    mine = {
        name: sum(int(counts[labels[mask > 0]].sum()) for _, (labels, mask) in batches)
        for name, batches in held_out.items()
    }
    shares = dict(joined.gather((joined.data_rank, mine)))  # ranks of one data coordinate have the same share
    return {name: sum(share[name] for share in shares.values()) for name in held_out}


def _short_names(paths: list[str]) -> list[str]:
    """wiki/held_out, books/held_out: as few last folders of each path as tell them apart, but at least one."""
    for length in range(1, max((len(Path(path).parts) for path in paths), default=0) + 1):
        names = ["/".join(Path(path).parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return paths


def _require_same_kernels(joined: Groups, facts: dict[str, str]) -> None:
    """Refuse ranks that chose different kernels: their weights would drift apart."""
    for name in ("attention", "norm", "loss", "optimizer"):
        chosen = joined.gather(facts.get(name, "torch"))
        if len(set(chosen)) > 1:
            other = next(rank for rank, choice in enumerate(chosen) if choice != chosen[0])
            way_out = "" if name == "loss" else ", or name one in the config"
            raise MegalmError(
                f"rank 0 takes {name} {chosen[0]} and rank {other} takes {chosen[other]}: install the same on all "
                f"machines{way_out}",
                echo=joined.rank > 0,
            )


def attention_needs(config: RunConfig, device: torch.device) -> Requirements:
    """What training asks of its attention kernel."""
    return requirements(
        config.model,
        device=device.type,
        dtype=DTYPES[config.train.precision],
        segmented=config.segmented,
        sequence_length=config.train.sequence_length,
    )


def _facts(planned: Plan, device: torch.device, sizes: Mapping[str, int]) -> dict[str, str]:
    """What was chosen for this run, for its log. sizes: of every parameter, by full name."""
    config = planned.config
    optimizer = config.optimizer
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    needs, compiled = attention_needs(config, device), config.compiles(device.type)
    attention = resolve(config.model.attention_backend, needs)
    precision = f"{config.train.precision} and fp8" if config.train.fp8 else config.train.precision
    return {
        "model": f"{config.model.num_parameters():,} parameters, vocabulary {config.model.vocab_size:,}",
        "layout": planned.layout.describe(),
        "batch": (
            f"{config.train.global_batch_size} x {config.train.sequence_length} tokens per step, "
            f"{planned.accumulation} micro-batches of {config.train.micro_batch_size} per rank"
        ),
        "device": f"{where}, {precision}, ZeRO {config.parallel.zero}",
        "attention": attention + (", compiled" if compiled and traces(attention, needs) else ""),
        "norm": f"{config.model.norm}, "
        + ("compiled" if compiled else resolve_norm(config.model.norm_implementation, device.type)),
        **({"loss": "one kernel for each pass"} if cross_entropy.fused(device) else {}),
        "optimizer": "AdamW, "
        + resolve_implementation(optimizer.implementation, device.type, config.parallel.offload_optimizer),
        **_tuning_facts(config, sizes),
        **({"unproved": planned.unproved} if planned.unproved else {}),
    }


def _tuning_facts(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, str]:
    tuning = config.tuning
    if not (tuning.adapts or tuning.freeze):
        return {}
    trained = sum(size for name, size in sizes.items() if tunings.is_trained(name, tuning))
    return {"tuning": f"{tuning.method}, {trained:,} of {sum(sizes.values()):,} parameters are trained"}
