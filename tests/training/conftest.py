"""Real text as shards, and runs over it."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from megalm.data import shards
from megalm.tokenizer.train import train


def build_corpus(folder: Path) -> Path:
    """tokenizer/ and shards/{train,held_out} of Python's documentation topics, in `folder`."""
    documents = folder / "topics.jsonl"
    documents.write_text("".join(json.dumps({"text": text, "source": name}) + "\n" for name, text in topics.items()))
    train(topics.values, 600).save(folder / "tokenizer")
    shards.write([documents], folder / "tokenizer", folder / "shards", held_out_fraction=0.1)
    return folder


def tree_of(corpus: Path, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The tree of a tiny run; keyword arguments update its sections."""
    made: dict[str, Any] = {
        "run": {"directory": str(directory)},
        "data": {
            "sources": [{"path": str(corpus / "shards" / "train")}],
            "held_out": [{"path": str(corpus / "shards" / "held_out")}],
            "tokenizer": str(corpus / "tokenizer"),
        },
        "model": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": 4},
        "train": {
            "steps": 8,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "sequence_length": 32,
            "precision": "fp32",
        },
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"total_steps": 8, "warmup_steps": 2},
        "checkpoint": {"every": 4},
        "evaluate": {"every": 4, "sequences": 8},
        "logging": {"progress_bar": "off"},
    }
    for key, section in sections.items():
        made[key] = made.get(key, {}) | section
    return made


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/ and shards/{train,held_out} of Python's documentation topics."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The tree of a tiny run in tmp_path/NAME; keyword arguments update its sections."""
    return lambda name="run", **sections: tree_of(corpus, tmp_path / name, **sections)
