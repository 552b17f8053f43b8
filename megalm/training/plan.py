"""A config held against the ranks that were started and the files it names, before anything is allocated."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megalm.data.index import ShardReader
from megalm.errors import MegalmError
from megalm.layout import Layout, check_model
from megalm.models.config import ModelConfig
from megalm.nn.config import Recompute
from megalm.parallel.config import ParallelConfig
from megalm.parallel.proved import proved
from megalm.sft.augment import open_augment
from megalm.sft.config import scores_of
from megalm.sft.heads import HeadTask
from megalm.sft.metrics import require_installed
from megalm.sft.open import check_rows, open_task
from megalm.sft.task import Task
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load as load_tokenizer
from megalm.training.config import RunConfig


@dataclass(frozen=True)
class Plan:
    """config: with the model's vocab_size, head and num_labels filled in. accumulation: micro-batches of one rank per
    step. unproved: what no test has proved and parallel.allow_unproved lets pass, empty if there is nothing. task: of
    fine-tuning."""

    config: RunConfig
    layout: Layout
    accumulation: int
    tokenizer: Tokenizer
    unproved: str
    task: Task | None = None


def stages(parallel: ParallelConfig) -> int:
    """Pieces the layers are cut into."""
    return parallel.pipeline * (2 if parallel.pipeline_schedule == "dualpipev" else 1)


def plan(config: RunConfig, world_size: int) -> Plan:
    """Raises MegalmError, with numbers and the nearest legal choice, for what cannot run on `world_size` ranks; and
    for a tokenizer, shards, rows or a run folder that cannot be used. Changes no file.
    """
    parallel, train, model = config.parallel, config.train, config.model
    layout = Layout.of(world_size, tensor=parallel.tensor, pipeline=parallel.pipeline)
    accumulation = layout.accumulation(train.global_batch_size, train.micro_batch_size)
    pieces = stages(parallel)
    if parallel.pipeline_schedule == "dualpipev" and accumulation < pieces:
        needed = pieces * train.micro_batch_size * layout.data
        raise MegalmError(
            f"parallel.pipeline_schedule dualpipev over {parallel.pipeline} ranks needs at least {pieces} "
            f"micro-batches per step, not {accumulation}: raise train.global_batch_size to {needed} or lower "
            "train.micro_batch_size"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    elif model.vocab_size < tokenizer.vocab_size:
        raise MegalmError(
            f"model.vocab_size {model.vocab_size} is below the {tokenizer.vocab_size} ids of {config.data.tokenizer}: "
            "leave it out to take the tokenizer's"
        )
    task = None
    if config.task:
        task = open_task(config.task, config.data, tokenizer, train.sequence_length)
        if config.data.held_out:
            require_installed(scores_of(config.task, config.evaluate.max_new_tokens > 0))
        if isinstance(task, HeadTask):
            model = _with_head(model, task)
    check_model(
        layout,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.key_value_heads,
        intermediate_size=model.feed_forward_width,
        padded_vocab_size=model.padded_vocab_size(),
        num_layers=model.num_layers,
        stages=pieces,
    )
    planned = config.model_copy(update={"model": model})
    choices = get_args(Recompute) if parallel.recompute == "auto" else (parallel.recompute,)
    problems = [proved().problem(planned.with_recompute(choice), layout, accumulation) for choice in choices]
    unproved = next(filter(None, problems), None)
    if unproved and not parallel.allow_unproved:
        raise MegalmError(f"{unproved}: choose what is (docs/support.md), or set parallel.allow_unproved to true")
    # Refuses what the loader would refuse, some seconds later.
    if task and config.task:
        check_rows(task, config.data, train.sequence_length)
        open_augment(config.task, tokenizer, config.run.seed)
    else:
        for source in (*config.data.sources, *config.data.held_out):
            ShardReader(source.path, tokenizer)
    _check_directory(Path(config.run.directory))
    return Plan(planned, layout, accumulation, tokenizer, unproved or "", task)


def _with_head(model: ModelConfig, task: HeadTask) -> ModelConfig:
    """Raises MegalmError if the config asks for another head than the task's."""
    head: dict[str, Any] = {"head": task.head, "num_labels": len(task.labels)}
    for key, value in head.items():
        if key in model.model_fields_set and getattr(model, key) not in (None, value):
            raise MegalmError(
                f"model.{key} is {getattr(model, key)} and task.kind {task.config.kind} needs {value}: leave it out to "
                "take the task's"
            )
    if model.z_loss:
        raise MegalmError(
            f"model.z_loss is of a language model, and task.kind {task.config.kind} trains none: set it to 0"
        )
    return model.model_copy(update=head)


def _check_directory(directory: Path) -> None:
    """Refuse a run folder that cannot be made or written."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a folder" if not there.is_dir() else "may not be written by you"
        raise MegalmError(f"run.directory {directory} cannot be used, {there} {why}: choose another run.directory")
