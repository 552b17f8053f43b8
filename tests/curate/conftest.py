"""Small sources, and recipes over them."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import tqdm

from megalm.curate.recipe import Recipe
from megalm.tokenizer.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = "tests.curate.small_steps"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "你好", "世界", "数据", "<b>bold</b>"]
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's watchman, whom forked processes would not have."""
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


@pytest.fixture(scope="session")
def perplexity_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good.jsonl, paragraphs of Python's help, and the model that the tool made of them."""
    pytest.importorskip("kenlm")
    folder = tmp_path_factory.mktemp("perplexity")
    paragraphs = [text for topic in topics.values() for text in re.split(r"\n\s*\n", topic) if len(text) > 80]
    with (folder / "good.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": " ".join(text.split())}) + "\n" for text in paragraphs)
    train(lambda: paragraphs, 800, sample_bytes=300_000).save(folder / "tokenizer")
    command = [sys.executable, "tools/train_perplexity_model.py", "--corpus", folder / "good.jsonl", "--tokenizer",
               folder / "tokenizer", "--output", folder / "model"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "n-grams of length 1 to 5" in done.stdout and "50 % below" in done.stdout
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Three JSONL files, with repetitions, short texts and a broken line each."""
    generator = random.Random(1)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        lines = []
        for index in range(100):
            text = " ".join(generator.choices(WORDS, k=int(generator.lognormvariate(2.5, 1)) + 1))
            text = "one text, again and again, word for word" if index % 7 == 0 else f" {text}\n"
            lines.append(json.dumps({"text": text, "language": generator.choice(["en", "zh"]), "id": index}))
        lines.insert(50, '{"text": broken')
        (folder / f"{number}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path, inputs: Path) -> MakeRecipe:
    """A recipe of two phases with small chunks; keyword arguments replace its keys."""

    def make(directory: str = "out", **changes: Any) -> Recipe:
        tree: dict[str, Any] = {
            "name": "small",
            "directory": str(tmp_path / directory),
            "sources": [{"name": "web", "path": str(inputs / "*.jsonl")}],
            "steps": [
                {"kind": f"{STEPS}:LongEnough", "characters": 35},
                {"kind": f"{STEPS}:FirstOnly"},
                {"kind": f"{STEPS}:LongEnough", "characters": 40},
            ],
            "tasks": 2,
            "batches": {"documents": 16, "per_chunk": 3},
        }
        return Recipe.model_validate(tree | changes)

    return make
