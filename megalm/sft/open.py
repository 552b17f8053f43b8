"""From a config to a task, and from its sources to examples on disk."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from megalm.data.config import DataConfig
from megalm.data.corpus import read_lines
from megalm.errors import MegalmError
from megalm.sft import classify, text
from megalm.sft.augment import Synonyms
from megalm.sft.classify import open_classification
from megalm.sft.config import TaskConfig, TaskKind
from megalm.sft.read import read_examples, row_files
from megalm.sft.span import open_question_answering
from megalm.sft.tag import open_tagging
from megalm.sft.task import Task
from megalm.tokenizer.base import Tokenizer

Opener = Callable[[TaskConfig, DataConfig, Tokenizer, int], Task]
"""A task from its config, where its rows are, the tokenizer and train.sequence_length."""

OPENERS: Mapping[TaskKind, Opener] = {
    "chat": text.open_chat,
    "dialogue": text.open_dialogue,
    "summarization": text.open_asked,
    "translation": text.open_asked,
    "continuation": text.open_continuation,
    "text_classification": partial(open_classification, classify.TextClassification),
    "pair_classification": partial(open_classification, classify.PairClassification),
    "relation_extraction": partial(open_classification, classify.RelationExtraction),
    "token_classification": open_tagging,
    "question_answering": open_question_answering,
}
"""How a task of each kind is made."""
FORMAT = 3
"""Of the arrays on disk, and of what becomes of a row: a higher number than the one they were written under makes
them anew."""
LOOKED_AT = 100
"""Rows of a source that check_rows() tries."""


def open_task(config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> Task:
    """The task of a config. Raises MegalmError if it cannot be had with this tokenizer, or its files do not serve."""
    if config.kind not in OPENERS:
        raise MegalmError(f"task.kind {config.kind} is not built yet: choose from {', '.join(OPENERS)}")
    return OPENERS[config.kind](config, data, tokenizer, sequence_length)


def check_rows(task: Task, data: DataConfig, sequence_length: int) -> None:
    """Raise MegalmError if a source is missing, or if none of its first rows is one of the task's."""
    for source in (*data.sources, *data.held_out):
        read_examples(task, source.path, sequence_length, "truncate", at_most=LOOKED_AT)


def keep_examples(
    task: Task,
    config: TaskConfig,
    path: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    folder: Path,
    synonyms: Synonyms | None = None,
) -> Path:
    """Where below `folder` the examples of a source lie (data.examples.ExampleSet.load); they are made if they do not
    lie there yet. Raises MegalmError as read_examples does."""
    digest = hashlib.sha256()
    facts = {key: value for key, value in task.facts.items() if key != "chat_template"}  # its hash is there too
    deciding = [
        FORMAT, config.model_dump(), facts, tokenizer.fingerprint, tokenizer.pad_id, sequence_length, path,
        synonyms.facts if synonyms else None,
    ]  # fmt: skip
    digest.update(json.dumps(deciding, sort_keys=True).encode())
    for file in row_files(path):
        for line in read_lines(file):
            digest.update(line)
    kept = folder / digest.hexdigest()[:16]
    if not kept.exists():
        read_examples(task, path, sequence_length, config.long_examples, variants=synonyms).save(kept)
    return kept
