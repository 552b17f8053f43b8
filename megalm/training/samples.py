"""What a run trains on: windows of shards, or rows of fine-tuning examples. Imports nothing that takes seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalm.data.config import SourceConfig
from megalm.data.examples import ExampleSet, Rows
from megalm.data.packing import Windows
from megalm.errors import MegalmError
from megalm.sft.augment import open_augment, repeat_rare
from megalm.sft.open import keep_examples
from megalm.sft.read import read_examples
from megalm.sft.task import Task
from megalm.tokenizer.base import Tokenizer
from megalm.training.config import RunConfig


def open_samples(
    config: RunConfig,
    tokenizer: Tokenizer,
    task: Task | None,
    sources: Sequence[SourceConfig] | None = None,
    decide: Callable[[Callable[[], Any]], Any] | None = None,
) -> Windows | Rows:
    """The samples of a run, or of `sources` instead of those it trains on.

    decide: asks rank 0 (parallel.groups.Groups.decide). It turns rows into examples, once for all ranks and resumed
    runs, in RUN/examples, and every rank maps the same files. Without it they are made in memory.

    Raises MegalmError for files that are missing, damaged, of another tokenizer or without anything to train on.
    """
    training = sources is None
    sources = config.data.sources if sources is None else sources
    if task is None:
        if config.model.head != "language_model":
            raise MegalmError(f"model.head {config.model.head} needs labels, and shards have none: name a task")
        return Windows(
            sources,
            tokenizer,
            config.train.sequence_length,
            attend_across_documents=config.data.attend_across_documents,
            verify_checksums=config.data.verify_checksums,
        )
    settings, length = config.task, config.train.sequence_length
    assert settings is not None
    folder = Path(config.run.directory) / "examples"
    augment = open_augment(settings, tokenizer, config.run.seed) if training else None
    synonyms = augment.synonyms if augment else None
    if decide is None:
        sets = [
            read_examples(task, source.path, length, settings.long_examples, variants=synonyms) for source in sources
        ]
    else:
        kept = decide(
            lambda: [
                keep_examples(task, settings, source.path, tokenizer, length, folder, synonyms) for source in sources
            ]
        )
        sets = [ExampleSet.load(folder) for folder in kept]
    if augment and augment.alpha < 1:
        sets = [repeat_rare(each, augment.alpha, task.facts.get("labels", ())) for each in sets]
    return Rows(
        sets,
        [source.weight for source in sources],
        sequence_length=length,
        pad_id=tokenizer.pad_id,
        arrangement=settings.arrangement,
        global_batch_size=config.train.global_batch_size,
        facts={"tokenizer": tokenizer.fingerprint, **task.facts},
        fixed_length=config.parallel.pipeline > 1,
        multiple=config.parallel.tensor if config.parallel.sequence_parallel else 1,
        augment=augment.dropout if augment else None,
    )
