"""Answers that a model in training writes: under every layout what it writes once it is loaded, and their scores."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megalm.data.examples import Example
from megalm.eval.generate import Sampling, collect, generate
from megalm.eval.load import load_model
from megalm.parallel.engine import LossOrLogits
from megalm.sft import metrics
from megalm.sft.answers import prompt_and_answer
from megalm.sft.report import read_predictions
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.chat import Chat
from megalm.training.config import RunConfig
from tests.distributed.ranks import run_ranks
from tests.sft.conftest import write_rows
from tests.sft.test_training import tree_of
from tests.training.runs import curve, train_run

NUMBERS = {
    "eins": "one",
    "zwei": "two",
    "drei": "three",
    "vier": "four",
    "五": "five",
    "六": "six",
    "七": "seven",
    "八": "eight",
}
MOST = 16
KIND: dict[str, Any] = {
    "task": {"kind": "translation", "prompt": "{source}"},
    "evaluate": {"max_new_tokens": MOST, "sequences": 6, "metric": "bleu", "keep_best": True},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2 x data 2, sorted": (
        4,
        {"parallel": {"tensor": 2, "sequence_parallel": True, "zero": 2}, "task": {"arrangement": "sorted"}},
    ),
    "data 2, ZeRO 3": (2, {"parallel": {"zero": 3}}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "pipeline 2 x tensor 2, DualPipeV": (
        4,
        {"parallel": {"pipeline": 2, "tensor": 2, "pipeline_schedule": "dualpipev"}, "model": {"num_layers": 4}},
    ),
}


def tree(folder: Path, tokenizer_folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    rows = [
        {"source": f"{a} {b}", "target": f"{x} {y} {x} {y}"} for a, x in NUMBERS.items() for b, y in NUMBERS.items()
    ]
    path = str(write_rows(folder / "numbers.jsonl", rows))
    made = tree_of(folder, tokenizer_folder, [], run={"directory": str(folder / name)}, **KIND)
    made["data"] |= {"sources": [{"path": path}], "held_out": [{"path": path}]}
    made["model"] |= {"num_layers": 4}
    made["checkpoint"] = {"every": 0, "asynchronous": False}
    for key, section in sections.items():
        made[key] = made[key] | section if isinstance(made.get(key), dict) else section
    return made


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The folder of a run that has learnt some of it: answers differ, some are right and some are not."""
    folder = tmp_path_factory.mktemp("answers")
    steps = {"steps": 90, "global_batch_size": 8, "micro_batch_size": 8}
    made = tree(folder, tokenizer_folder, "run", train=steps, optimizer={"learning_rate": 1e-2})
    assert run_ranks(1, train_run, made) == [0]
    return folder


def written(run: Path) -> dict[tuple[str, str], str]:
    """What was asked, and what is right -> what the model wrote."""
    found = read_predictions(run)
    assert found is not None
    [rows] = found.corpora.values()
    assert all(row.file and row.row for row in rows)
    return {(row.text, row.reference): row.prediction for row in rows}


def test_answers_are_those_of_the_loaded_model(learned: Path, tokenizer: Tokenizer) -> None:
    model, config, _ = load_model(learned / "run")
    chat = Chat(tokenizer)
    found = written(learned / "run")
    assert len(found) > 6, "rows are packed, and each of their examples is asked"
    assert len(set(found.values())) > 3 and {a == b for (_, a), b in found.items()} == {True, False}
    for (asked, right), said in found.items():
        source = asked.removeprefix("user\n").removesuffix("assistant\n").strip()
        prompt = chat.encode([{"role": "user", "content": source}])
        greedy = Sampling(temperature=0)
        pieces = generate(model, config, tokenizer, [prompt], max_new_tokens=MOST, sampling=greedy, ends=chat.ends)
        assert collect(pieces, 1)[0].strip() == said
        assert right == " ".join([NUMBERS[word] for word in source.split()] * 2)


def test_scores_are_those_of_what_was_written(learned: Path, tokenizer_folder: Path) -> None:
    records = curve(tree(learned, tokenizer_folder, "run"))
    scores, found = records[-1]["scores"]["numbers.jsonl"], written(learned / "run")
    references = [right for _, right in found]
    said = list(found.values())
    expected = metrics.bleu_chrf(references, said)
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert scores["perplexity"] == pytest.approx(np.exp(records[-1]["held_out"]["numbers.jsonl"]))
    assert records[-1]["selection"]["value"] == scores["bleu"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_the_same(name: str, learned: Path, tokenizer_folder: Path) -> None:
    size, sections = LAYOUTS[name]
    still = {"train": {"steps": 1, "micro_batch_size": 1}, "optimizer": {"learning_rate": 1e-30}}
    sections = {**still, **sections}
    model = sections.get("model", {}) | {"init_from": str(learned / "run" / "checkpoints")}
    made = tree(learned, tokenizer_folder, name.replace(" ", ""), **{**sections, "model": model})
    assert run_ranks(size, train_run, made) == [0] * size
    there = written(learned / name.replace(" ", ""))
    here = written(learned / "run")
    if sections.get("task"):  # other rows, of one example each
        assert len(there) == 6 and there.items() <= read_all(learned, tokenizer_folder).items()
    else:
        assert there == here


def read_all(learned: Path, tokenizer_folder: Path) -> dict[tuple[str, str], str]:
    """Answers to all rows, on one rank."""
    if not (learned / "all").exists():
        still = {"train": {"steps": 1, "micro_batch_size": 1}, "optimizer": {"learning_rate": 1e-30}}
        model = {"init_from": str(learned / "run" / "checkpoints")}
        made = tree(learned, tokenizer_folder, "all", **still, model=model, evaluate={"sequences": 64})
        assert run_ranks(1, train_run, made) == [0]
    return written(learned / "all")


def test_an_id_of_another_place_is_seen(learned: Path, tokenizer_folder: Path) -> None:
    """Negative control: the position before the one that is asked for."""
    model = {"init_from": str(learned / "run" / "checkpoints")}
    still = {"train": {"steps": 1, "micro_batch_size": 1}, "optimizer": {"learning_rate": 1e-30}}
    made = tree(learned, tokenizer_folder, "late", **still, model=model)
    assert run_ranks(1, partial(train_run, sabotage=_one_before), made) == [0]
    assert written(learned / "late") != written(learned / "run")


def _one_before(run: Any) -> None:
    right = LossOrLogits.__call__
    LossOrLogits.__call__ = lambda self, logits, targets: right(  # type: ignore[method-assign]
        self, logits, (targets[0], targets[1].roll(-1, dims=1)) if self.keep is not None else targets
    )


def test_the_last_trained_stretch_is_the_answer() -> None:
    ids = np.arange(10, 20)
    example = Example(ids[:-1], ids[1:], np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], np.uint8))
    assert prompt_and_answer(example, {99}) == ([10, 11, 12, 13, 14, 15], [16, 17, 18])
    trained = Example(ids[:-1], ids[1:], np.ones(9, np.uint8))
    assert prompt_and_answer(trained, {99}) == ([10], list(range(11, 20)))
    assert prompt_and_answer(trained, {14, 19}) == ([10, 11, 12, 13, 14], [15, 16, 17, 18, 19]), "another turn's end"


@pytest.mark.parametrize(
    ("task", "evaluate", "why"),
    [
        ({"kind": "continuation"}, {"max_new_tokens": 5}, "a row of continuation has no answer that is written"),
        ({"kind": "text_classification"}, {"max_new_tokens": 5}, "text_classification has no answer"),
        ({"kind": "chat", "train_on": "all"}, {"max_new_tokens": 5}, "does not tell answers from questions"),
        (None, {"max_new_tokens": 5}, "there is no task"),
        ({"kind": "translation"}, {"metric": "bleu"}, r"\(loss, bits_per_byte, perplexity\): .* set evaluate.max_new"),
        ({"kind": "translation"}, {"metric": "accuracy", "max_new_tokens": 5}, r"perplexity, bleu, chrf\): name"),
        ({"kind": "text_classification"}, {"metric": "exact_match"}, r"\(loss, accuracy, macro_f1, micro_f1\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    task: Any, evaluate: dict[str, Any], why: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    made = tree(tmp_path, tokenizer_folder, "run") | {"task": task, "evaluate": {"patience": 1} | evaluate}
    with pytest.raises(ValidationError, match=why):
        RunConfig.model_validate(made)
