"""Tasks with a head of their own: rows to examples, logits to answers, and configs/run/task_*.yaml on rows that a small
model can tell apart."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from megalm.config import load as load_config
from megalm.sft.report import read_predictions
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train as train_tokenizer
from megalm.training.config import RunConfig
from tests.distributed.ranks import Pool
from tests.training.runs import train_run

REPOSITORY = Path(__file__).resolve().parents[2]
COLOURS, ANIMALS = ["red", "green", "blue", "grey"], ["cat", "dog", "owl", "eel"]
Row = dict[str, Any]


def text_row(draw: random.Random) -> Row:
    colour = draw.choice(COLOURS)
    return {"text": f"the {draw.choice(ANIMALS)} number {draw.randrange(100)} was {colour}", "label": colour}


def multi_row(draw: random.Random) -> Row:
    there = sorted(draw.sample(COLOURS, draw.randrange(4)))
    return {"text": f"number {draw.randrange(1000)} was {' '.join(there) or 'no colour'}", "label": there}


def pair_row(draw: random.Random) -> Row:
    first, second = draw.choice(COLOURS[:2]), draw.choice(COLOURS[:2])
    number = draw.randrange(500)
    return {
        "sentence1": f"{number} was {first}",
        "sentence2": f"it is {second}",
        "label": {("red", "red"): "same", ("green", "green"): "same"}.get((first, second), "other"),
    }


def token_row(draw: random.Random) -> Row:
    words, tags = [], []
    for _ in range(draw.randrange(3, 8)):
        kind = draw.choice(["COLOUR", "ANIMAL", ""])
        if kind:
            words += [kind.lower(), draw.choice(COLOURS if kind == "COLOUR" else ANIMALS)]
            tags += [f"B-{kind}", f"I-{kind}"]
        else:
            words.append(f"n{draw.randrange(50)}")
            tags.append("O")
    return {"tokens": words, "tags": tags}


def relation_row(draw: random.Random) -> Row:
    verb, label = draw.choice([("eats", "Eats"), ("sees", "Other"), ("owns", "Owns")])
    one, two = draw.choice(ANIMALS), draw.choice(ANIMALS)
    return {"text": f"{draw.randrange(99)} <e1>{one}</e1> {verb} <e2>{two}</e2>", "label": label}


def answer_row(draw: random.Random) -> Row:
    facts = [f"x{draw.randrange(10)}" for _ in range(4)]
    place = draw.randrange(4)
    facts[place] = f"answer {draw.choice(ANIMALS)}{draw.randrange(30)}"
    context = " , ".join(facts)
    found = facts[place].removeprefix("answer ")
    return {
        "question": "which?",
        "context": context,
        "answers": {"text": [found], "answer_start": [context.index(found)]},
    }


TASKS: dict[str, tuple[Callable[[random.Random], Row], str, float, dict[str, Any]]] = {
    # config: (row, metric, what it must reach: chance is far below, what to change)
    "text_classification": (text_row, "accuracy", 0.9, {}),
    "pair_classification": (pair_row, "accuracy", 0.9, {}),
    "token_classification": (token_row, "f1", 0.8, {}),
    "relation_extraction": (relation_row, "f1", 0.9, {}),
    "question_answering": (answer_row, "exact_match", 0.5, {}),
    "text_classification, several labels": (multi_row, "micro_f1", 0.8, {"multi_label": True}),
}


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, folder = random.Random(9), tmp_path_factory.mktemp("tokenizer")
    makers = [make for make, *_ in TASKS.values()]
    texts = [json.dumps(make(draw), ensure_ascii=False) for make in makers for _ in range(150)]
    train_tokenizer(lambda: iter([*texts, "红色的猫。蓝色的狗。"]), 400).save(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load(tokenizer_path)


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(make: Callable[[random.Random], Row], count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [make(draw) for _ in range(count)]


def config(name: str, folder: Path, tokenizer: Path, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """The tree of configs/run/task_NAME.yaml over rows in a folder, with a smaller model."""
    make, _, _, task = TASKS[name]
    run = load_config(REPOSITORY / "configs" / "run" / f"task_{name.partition(',')[0]}.yaml", RunConfig)
    tree = run.model_dump(exclude_unset=True)
    changes: dict[str, dict[str, Any]] = {
        "run": {"directory": str(folder / "run")},
        "task": task,
        "model": {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128},
        "data": {
            "sources": [{"path": str(write(folder / "train.jsonl", rows_of(make, 300, 1)))}],
            "held_out": [{"path": str(write(folder / "held_out.jsonl", rows_of(make, 60, 2)))}],
            "tokenizer": str(tokenizer),
            "prefetch": 0,
        },
        "train": {"steps": steps, "sequence_length": 64, "global_batch_size": 8, "micro_batch_size": 8},
        "optimizer": {"learning_rate": 5e-3},
        "evaluate": {"every": 0},
        "logging": {"every": steps},
    }
    for key in changes | sections:
        tree[key] = tree.get(key, {}) | changes.get(key, {}) | sections.get(key, {})
    return tree


@pytest.fixture(scope="module")
def rank() -> Iterable[Pool]:
    with Pool(1) as pool:
        yield pool


@pytest.mark.parametrize("name", TASKS)
def test_a_model_learns_each_task(name: str, tmp_path: Path, tokenizer_path: Path, rank: Pool) -> None:
    _, metric, least, _ = TASKS[name]
    tree = config(name, tmp_path, tokenizer_path, 100 if name in ("question_answering", "token_classification") else 40)
    assert rank.run(train_run, tree) == [0]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    [scores] = record["scores"].values()
    assert scores[metric] >= least, scores
    kept = read_predictions(tmp_path / "run")
    assert kept is not None and (kept.step, kept.kind) == (record["step"], tree["task"]["kind"])
    [said] = kept.corpora.values()
    assert len(said) > 30 and all(each.file == tree["data"]["held_out"][0]["path"] and each.row for each in said)
