"""A small corpus, its tokenizer and its shards."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megalm.data import shards
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of one character up to some thousands."""
    generator = random.Random(0)
    source = "".join(topics.values())
    sizes = [1, 2, 5, *(int(generator.lognormvariate(5.0, 1.5)) + 1 for _ in range(600))]
    return [source[start : start + size].strip() or "x" for size in sizes if (start := generator.randrange(400_000))]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(topics.values, 1000).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load(tokenizer_path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "source": str(i)}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_path: Path) -> Path:
    """Shards of all documents, over several files; read it, do not change it."""
    output = tmp_path_factory.mktemp("shards") / "all"
    shards.write([corpus], tokenizer_path, output, shard_bytes=100_000)
    return output / "train"


@pytest.fixture(scope="session")
def stream(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """What the folder must hold: the ids of each document."""
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
