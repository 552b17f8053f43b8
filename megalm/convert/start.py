"""Training that starts from the weights of another model (model.init_from)."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from megalm.checkpoint.config import CHANGEABLE
from megalm.convert.architectures import maths
from megalm.convert.gate import TEXT
from megalm.convert.sources import CheckpointSource, FolderSource, Source, open_source
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load as load_tokenizer


def open_start(
    path: Path, config: ModelConfig, tokenizer: Tokenizer, allowed: Collection[str], labels: Sequence[str] = ()
) -> Source:
    """The weights that a model of `config` starts from.

    path: a Hugging Face folder, a run or a checkpoint. allowed: keys (`model.rope_theta`) that may differ from those of
    the model there. labels: names of the task's classes, by number.

    Raises MegalmError if there is none, if it is another model (naming the key and the value to set), if its head has
    other classes, or if its tokenizer gives other ids.
    """
    source = open_source(path)
    theirs, ours = maths(source.config.model_dump()), maths(config.model_dump())
    if source.config.head == "language_model" != config.head:
        theirs |= {key: ours[key] for key in ("head", "num_labels", "tie_word_embeddings")}  # the head is a fresh one
    different = [key for key in ModelConfig.model_fields if key in ours and theirs[key] != ours[key]]
    for key in sorted(different, key=lambda key: key != "head"):  # the others may follow from it
        name = f"model.{key}"
        if name in allowed:
            continue
        otherwise = f", or allow it with checkpoint.allow_changes=[{name}]" if name in CHANGEABLE else ""
        raise MegalmError(
            f"model.init_from {path} is a model with {key}={theirs[key]} and the config says {ours[key]}: set "
            f"{name}={theirs[key]}{otherwise}"
        )
    table = "positions.weight"
    if table in source.shapes and source.shapes[table][0] != config.max_position_embeddings:
        raise MegalmError(
            f"model.init_from {path} has a table of {source.shapes[table][0]} positions: set "
            f"model.max_position_embeddings={source.shapes[table][0]}"
        )
    classifies = source.config.head == config.head and config.head.endswith("classification")
    if labels and classifies and (known := _labels(source)) and known != list(labels):
        old, new = (json.dumps(names, ensure_ascii=False) for names in (known, list(labels)))
        raise MegalmError(
            f"the head of model.init_from {path} was trained on other classes than the task's {new}: name them in "
            f"task.labels in the old order, {old}, or start from a language model, which gets a new head"
        )
    if not _same_ids(source, tokenizer):
        raise MegalmError(
            f"data.tokenizer is not the tokenizer of model.init_from {path}, it gives other ids: write the shards with "
            "that one"
        )
    return source


def _labels(source: Source) -> list[str]:
    """Names of the classes of a head, by number; empty if it does not tell them, as `LABEL_0` does not."""
    if isinstance(source, CheckpointSource):
        names = list(source.manifest.data.get("blend", {}).get("labels") or ())
    else:
        assert isinstance(source, FolderSource)
        described = source.described.get("id2label") or {}
        names = [described[number] for number in sorted(described, key=int)]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _same_ids(source: Source, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer gives the ids that the model there was trained on, as far as can be known."""
    where = source.path
    if isinstance(source, CheckpointSource):
        if source.manifest.data.get("blend", {}).get("tokenizer") in (None, tokenizer.fingerprint):
            return True
        where = Path(source.manifest.config["data"]["tokenizer"])
        if not where.exists():
            return False
    try:
        other = load_tokenizer(where)
    except MegalmError:
        return True  # a folder of weights alone
    if other.fingerprint == tokenizer.fingerprint:
        return True
    # tokenizer.json of an exported model has another fingerprint than the sentencepiece model it was made of
    lines = TEXT.splitlines(keepends=True)
    return (
        (other.vocab_size, other.eos_id, other.bos_id) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id)
        and other.special_tokens == tokenizer.special_tokens
        and other.encode_batch(lines) == tokenizer.encode_batch(lines)
    )
