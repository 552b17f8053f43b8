"""Small sources, and recipes over them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tqdm

from megalm.curate.recipe import Recipe

STEPS = "tests.curate.small_steps"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "你好", "世界", "数据", "<b>bold</b>"]
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's watchman, whom forked processes would not have."""
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


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
