"""The composition root: the one place that joins the rooms into a run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint.saver import Saver
from megalm.config import dump
from megalm.data.config import SourceConfig
from megalm.data.loader import Loader, held_out_batches
from megalm.data.packing import Windows
from megalm.errors import MegalmError
from megalm.models.decoder import LayerSpec, build_model, decoder
from megalm.nn.attention import requirements
from megalm.nn.init import spec_of
from megalm.nn.kernels import resolve
from megalm.nn.layers import Layers
from megalm.nn.loss import token_loss
from megalm.nn.norm import resolve_norm
from megalm.optim.adamw import MOMENTS, build_optimizer, resolve_implementation
from megalm.optim.parameters import parameter_groups
from megalm.parallel import deepspeed_config, engine, groups
from megalm.parallel import device as devices
from megalm.parallel.engine import Engine
from megalm.parallel.groups import Groups
from megalm.parallel.pipeline import pipeline_module
from megalm.parallel.tensor import TensorParallelLayers
from megalm.tokenizer.base import Tokenizer
from megalm.training import preflight, resume
from megalm.training.callbacks.anomalies import Anomalies
from megalm.training.callbacks.checkpoints import Checkpoints
from megalm.training.callbacks.evaluation import Evaluation
from megalm.training.callbacks.garbage import GarbageCollection
from megalm.training.callbacks.metrics import Metrics
from megalm.training.callbacks.signals import Signals
from megalm.training.callbacks.stragglers import Stragglers
from megalm.training.config import RunConfig
from megalm.training.lock import Lock
from megalm.training.loop import tensors
from megalm.training.plan import Plan
from megalm.training.run import Run
from megalm.training.whereabouts import Whereabouts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    config: RunConfig,
    joined: Groups,
    device: torch.device,
    accept: Callable[[float], bool],
) -> tuple[Engine, list[LayerSpec]]:
    """This rank's part of the model at step 0, in the engine of its layout; and the whole model's layers."""
    model, parallel, train = config.model, config.parallel, config.train
    layers = (
        TensorParallelLayers(joined.tensor_group, sequence_parallel=parallel.sequence_parallel)
        if parallel.tensor > 1
        else Layers()
    )
    specs = decoder(
        model,
        layers,
        seed=config.run.seed,
        segmented=not config.data.attend_across_documents,
        recompute=parallel.recompute,
    )

    def loss(logits: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return token_loss(layers, logits, *targets, model.z_loss)

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
    if parallel.pipeline > 1:
        module: torch.nn.Module = pipeline_module(
            specs, layers, joined, schedule=parallel.pipeline_schedule, seed=config.run.seed, loss=loss
        )
    else:
        finish = partial(engine.partition, groups=joined, config=settings, dtype=DTYPES[train.precision])
        module = build_model(
            specs,
            config.run.seed,
            layers.tensor_rank,
            layers.tensor_size,
            *([finish] if parallel.zero == 3 else []),
        )
    decayed = parameter_groups(
        module.named_parameters(), config.optimizer.weight_decay, lambda name, p: spec_of(p).decay
    )
    optimizer = build_optimizer(decayed, config.optimizer, device.type, parallel.offload_optimizer)
    built = engine.create(
        module,
        optimizer,
        joined,
        config=settings,
        loss=loss,
        device=device,
        gradient_clipping=config.optimizer.gradient_clipping,
        accept=accept,
    )
    return built, specs


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
    groups.start(device)
    joined = groups.create(planned.layout)
    lock = Lock(Path(config.run.directory))

    def begin() -> tuple[Path | None, dict[str, Any] | None]:
        lock.acquire()
        found = resume.find(config)
        if found is None:
            return None, None
        manifest = checkpoints.read(found)
        resume.check(manifest, planned, str(found))
        return found, manifest.data

    found, state = joined.decide(begin)
    fitness = preflight.examine(planned, joined, device, whereabouts) if config.run.preflight else None
    whereabouts.note("building the model and opening the data")
    loader = Loader(
        windows(config, planned.tokenizer),
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
    anomalies = Anomalies(
        train.on_nan, train.on_spike, train.spike_factor, train.max_anomalies, scaled=train.precision == "fp16"
    )
    built, specs = build_engine(config, joined, device, anomalies.accept)
    padding = model.padded_vocab_size() - (model.vocab_size or 0)
    tables = 1 if model.tie_word_embeddings else 2
    assert built.num_parameters == model.num_parameters() + padding * model.hidden_size * tables, "a weight is missing"
    names = [spec.name for spec in specs]
    held_out = _held_out(planned, joined)
    facts = _facts(planned, device)
    if fitness:
        facts["preflight"] = fitness.summary
    _require_same_kernels(joined, facts)
    run = Run(
        planned,
        joined,
        built,
        lock=lock,
        saver=Saver(
            sum(piece.count for piece in built.pieces(names)) * (1 + len(MOMENTS)),
            pinned=device.type == "cuda" and not config.parallel.offload_optimizer,
            asynchronous=config.checkpoint.asynchronous,
        ),
        beside=joined.beside(),
        layer_names=names,
        held_out=held_out,
        loader=loader,
        facts=facts,
        whereabouts=whereabouts,
        # In this order each step: judge, listen, measure, write down, save.
        callbacks=[
            anomalies,
            Signals(),
            Stragglers(logging.stragglers_every),
            Evaluation(config.evaluate.every, _held_out_bytes(planned, joined, held_out)),
            Metrics(logging, device),
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
    for warning in fitness.warnings if fitness else []:
        run.say(f"warning: {warning}")
    if loader.restarted:
        run.say(f"the samples start anew from the first: {loader.restarted} changed, which is allowed")
    if run.is_main:
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "config.yaml").write_text(dump(config))
    return run


def windows(config: RunConfig, tokenizer: Tokenizer, sources: Sequence[SourceConfig] | None = None) -> Windows:
    """The samples of a pretraining run, or of `sources` instead of those it trains on."""
    return Windows(
        config.data.sources if sources is None else sources,
        tokenizer,
        config.train.sequence_length,
        attend_across_documents=config.data.attend_across_documents,
        verify_checksums=config.data.verify_checksums,
    )


def _held_out(planned: Plan, joined: Groups) -> dict[str, list[engine.MicroBatch]]:
    """This rank's micro-batches of every held-out corpus, by the shortest end of its path that tells it apart."""
    data = planned.config.data
    return {
        name: [
            tensors(batch)
            for batch in held_out_batches(
                windows(planned.config, planned.tokenizer, [source]),
                rank=joined.data_rank,
                size=planned.layout.data,
                micro_batch_size=planned.config.train.micro_batch_size,
                sequences=planned.config.evaluate.sequences,
            )
        ]
        for name, source in zip(_short_names([source.path for source in data.held_out]), data.held_out, strict=True)
    }


def _held_out_bytes(planned: Plan, joined: Groups, held_out: dict[str, list[engine.MicroBatch]]) -> dict[str, int]:
    """Bytes of the text that every corpus's evaluated tokens stand for, on all ranks. All ranks call it."""
    if not held_out:
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
    for name in ("attention", "norm", "optimizer"):
        chosen = joined.gather(facts[name])
        if len(set(chosen)) > 1:
            other = next(rank for rank, choice in enumerate(chosen) if choice != chosen[0])
            raise MegalmError(
                f"rank 0 takes {name} {chosen[0]} and rank {other} takes {chosen[other]}: install the same on all "
                "machines, or name one in the config",
                echo=joined.rank > 0,
            )


def _facts(planned: Plan, device: torch.device) -> dict[str, str]:
    """What was chosen for this run, for its log."""
    config = planned.config
    needs = requirements(
        config.model,
        device=device.type,
        dtype=DTYPES[config.train.precision],
        segmented=not config.data.attend_across_documents,
        sequence_length=config.train.sequence_length,
    )
    optimizer = config.optimizer
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "model": f"{config.model.num_parameters():,} parameters, vocabulary {config.model.vocab_size:,}",
        "layout": planned.layout.describe(),
        "batch": (
            f"{config.train.global_batch_size} x {config.train.sequence_length} tokens per step, "
            f"{planned.accumulation} micro-batches of {config.train.micro_batch_size} per rank"
        ),
        "device": f"{where}, {config.train.precision}, ZeRO {config.parallel.zero}",
        "attention": resolve(config.model.attention_backend, needs),
        "norm": f"{config.model.norm}, {resolve_norm(config.model.norm_implementation, device.type)}",
        "optimizer": "AdamW, "
        + resolve_implementation(optimizer.implementation, device.type, config.parallel.offload_optimizer),
        **({"unproved": planned.unproved} if planned.unproved else {}),
    }
