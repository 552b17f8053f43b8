"""Training that starts from the weights of another model (model.init_from)."""

from collections.abc import Collection
from pathlib import Path

from megalm.checkpoint.config import CHANGEABLE
from megalm.convert.architectures import maths
from megalm.convert.gate import TEXT
from megalm.convert.sources import CheckpointSource, Source, open_source
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load as load_tokenizer


def open_start(path: Path, config: ModelConfig, tokenizer: Tokenizer, allowed: Collection[str]) -> Source:
    """The weights that a model of `config` starts from.

    path: a Hugging Face folder, a run or a checkpoint. allowed: keys (`model.rope_theta`) that may differ from those of
    the model there.

    Raises MegalmError if there is none, if it is another model (naming the key and the value to set), or if its
    tokenizer gives other ids.
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
    if not _same_ids(source, tokenizer):
        raise MegalmError(
            f"data.tokenizer is not the tokenizer of model.init_from {path}, it gives other ids: write the shards with "
            "that one"
        )
    return source


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
