"""configs/run/task_*.yaml on rows that a small model can learn; and of tasks with a head of their own, rows to examples
and logits to answers."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config import load as load_config
from megalm.data.config import DataConfig, SourceConfig
from megalm.errors import MegalmError
from megalm.sft.config import TaskConfig, scores_of
from megalm.sft.heads import HeadTask
from megalm.sft.open import open_task
from megalm.sft.read import read_examples
from megalm.sft.report import is_right, read_predictions
from megalm.sft.span import best_span
from megalm.sft.task import Refused
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train as train_tokenizer
from megalm.training.config import RunConfig
from tests.distributed.ranks import Pool, RankFailed, run_ranks
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


def summary_row(draw: random.Random) -> Row:
    colour, animal = draw.choice(COLOURS), draw.choice(ANIMALS)
    return {"document": f"number {draw.randrange(100)} {animal} was {colour}", "summary": colour}


def translation_row(draw: random.Random) -> Row:
    colour, animal = draw.randrange(4), draw.randrange(4)
    source = f"{COLOURS[colour]} {ANIMALS[animal]} {draw.randrange(30)}"
    return {"source": source, "target": f"{'红绿蓝灰'[colour]}色的{'猫狗枭鳗'[animal]}"}


def dialogue_row(draw: random.Random) -> Row:
    colour, animal = draw.choice(COLOURS), draw.choice(ANIMALS)
    return {"turns": [f"{animal} {draw.randrange(30)} was {colour}", "I see", "which", colour]}


TASKS: dict[str, tuple[Callable[[random.Random], Row], str, float, dict[str, Any]]] = {
    # config: (row, metric, what it must reach: chance is far below, what to change)
    "text_classification": (text_row, "accuracy", 0.9, {}),
    "pair_classification": (pair_row, "accuracy", 0.9, {}),
    "token_classification": (token_row, "f1", 0.8, {}),
    "relation_extraction": (relation_row, "f1", 0.9, {}),
    "question_answering": (answer_row, "exact_match", 0.5, {}),
    "text_classification, several labels": (multi_row, "micro_f1", 0.8, {"multi_label": True}),
}
TEXTS: dict[str, tuple[Callable[[random.Random], Row], str, float, dict[str, Any]]] = {
    # of the perplexity the negative, so that more is better
    "summarization": (summary_row, "rougeL", 0.6, {"prompt": "{document}"}),
    "translation": (translation_row, "chrf", 60.0, {"prompt": "{source}"}),
    "dialogue": (dialogue_row, "rougeL", 0.6, {}),
    "continuation": (text_row, "perplexity", -8.0, {}),
}
ALL = TASKS | TEXTS


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, folder = random.Random(9), tmp_path_factory.mktemp("tokenizer")
    makers = [make for make, *_ in ALL.values()]
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
    make, _, _, task = ALL[name]
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


STEPS = {"question_answering": 100, "token_classification": 100} | dict.fromkeys(TEXTS, 160)


@pytest.mark.parametrize("name", ALL)
def test_a_model_learns_each_task(name: str, tmp_path: Path, tokenizer_path: Path, rank: Pool) -> None:
    _, metric, least, _ = ALL[name]
    tree = config(name, tmp_path, tokenizer_path, STEPS.get(name, 40))
    assert rank.run(train_run, tree) == [0]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    [scores] = record["scores"].values()
    assert scores[metric] * (-1 if metric == "perplexity" else 1) >= least, scores
    run = RunConfig.model_validate(tree)
    assert {*scores, "loss", "bits_per_byte"} == {
        *scores_of(run.task, bool(run.evaluate.max_new_tokens)),
        "bits_per_byte",
    }
    if name == "continuation":
        return
    kept = read_predictions(tmp_path / "run")
    assert kept is not None and (kept.step, kept.kind) == (record["step"], tree["task"]["kind"])
    [said] = kept.corpora.values()
    assert len(said) > 30 and all(each.file == tree["data"]["held_out"][0]["path"] and each.row for each in said)


def test_new_rows_do_not_renumber_the_classes_of_a_run(tmp_path: Path, tokenizer_path: Path) -> None:
    """As many classes, one of which sorts elsewhere by its new name."""
    tree = config("text_classification", tmp_path, tokenizer_path, 2, schedule={"warmup_steps": 1, "total_steps": 3})
    assert run_ranks(1, train_run, tree) == [0]
    for name in ("train", "held_out"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        write(tmp_path / f"{name}.jsonl", [row | {"label": row["label"].replace("red", "a red")} for row in rows])
    tree["train"]["steps"], tree["checkpoint"] = 3, {"allow_changes": ["data.sources"]}
    with pytest.raises(RankFailed, match=r'in the old order, \["blue", "green", "grey", "red"\], or start a new run'):
        run_ranks(1, train_run, tree)
    run = tree["run"]["directory"]
    other = tree | {"run": {"directory": f"{run}-2"}, "model": tree["model"] | {"init_from": run}}
    with pytest.raises(RankFailed, match=r'\["blue", "green", "grey", "red"\]'):
        run_ranks(1, train_run, other)
    for name in ("train", "held_out"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text().replace("a red", "red"))
    named = {"task": tree["task"] | {"labels": ["blue", "green", "grey", "red"]}}
    assert run_ranks(1, train_run, other | named) == run_ranks(1, train_run, tree | named) == [0]


# ---- rows to examples, logits to answers ----


def task_of(tokenizer: Tokenizer, folder: Path, rows: Iterable[Row], length: int = 64, **settings: Any) -> HeadTask:
    path = write(folder / "rows.jsonl", rows)
    task = open_task(TaskConfig(**settings), DataConfig(sources=[SourceConfig(path=str(path))]), tokenizer, length)
    assert isinstance(task, HeadTask)
    return task


def certain(task: HeadTask, row: Row) -> list[np.ndarray]:
    """Logits of a model that says what each example's labels say, and something else everywhere else."""
    found = []
    for example in task.examples(row):
        logits = np.zeros((len(example.ids), len(task.labels)), np.float32)
        if task.head == "question_answering":
            begin, end, length = example.labels[0]
            assert length == len(example.ids)
            logits[begin, 0] = logits[end, 1] = 5.0
        else:
            for place in np.flatnonzero(example.weights):
                truth = example.placed_labels[place]
                logits[place] = 4.0 * truth - 2.0 if truth.ndim else 3.0 * np.eye(len(task.labels))[truth]
        found.append(logits)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "text_classification": {},
    "pair_classification": {},
    "token_classification": {},
    "relation_extraction": {"none_label": "Other"},
    "question_answering": {},
    "text_classification, several labels": {"multi_label": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_row_says_comes_back_from_a_model_that_says_it(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    make, *_ = TASKS[name]
    rows = rows_of(make, 40, 3)
    task = task_of(tokenizer, tmp_path, rows, length=40, kind=name.partition(",")[0], **KINDS[name])
    answers = [task.predict(row, certain(task, row)) for row in rows]
    scores = task.score(answers)
    assert set(scores.values()) == {1.0}, scores
    wrong = [task.predict(row, [-logits for logits in certain(task, row)]) for row in rows]
    assert min(task.score(wrong).values()) < 0.5


def test_a_long_context_is_read_in_windows_that_share_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context = " ".join(f"一二 {number}" for number in range(60)) + " 答案在这里。" + " x" * 30
    row = {"question": "哪里?", "context": context, "answers": [{"text": "答案在这里"}]}
    task = task_of(tokenizer, tmp_path, [row], length=48, kind="question_answering", stride=20)
    examples = task.examples(row)
    assert len(examples) > 5
    assert max(len(example.ids) for example in examples) == 48
    holding = [example for example in examples if example.labels[0, 1] > 0]
    assert 1 <= len(holding) < len(examples)
    body = [
        example.ids[-(len(example.ids) - examples[0].ids.tolist().index(tokenizer.eos_id) - 1) :]
        for example in examples
    ]
    assert all(one[-20:].tolist() == two[:20].tolist() for one, two in zip(body, body[1:]))
    answer = task.predict(row, certain(task, row))
    assert (answer.reference, answer.prediction) == (["答案在这里"], "答案在这里")
    # Windows that were not evaluated are no answer.
    some = [logits if example.labels[0, 1] else logits[:0] for logits, example in zip(certain(task, row), examples)]
    assert task.predict(row, some).prediction == "答案在这里"


def test_a_question_may_have_no_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"question": "which?", "context": "the cat was red", "answers": {"text": [], "answer_start": []}}
    allowed = task_of(tokenizer, tmp_path, [row], kind="question_answering", unanswerable=True)
    [example] = allowed.examples(row)
    assert example.labels[0, :2].tolist() == [0, 0]
    assert allowed.predict(row, certain(allowed, row)).prediction == ""
    with pytest.raises(Refused, match="no answer"):
        task_of(tokenizer, tmp_path, [row], kind="question_answering").examples(row)


def test_the_best_span_begins_before_it_ends_and_is_not_too_long() -> None:
    logits = np.zeros((8, 2), np.float32)
    logits[6, 0], logits[3, 1] = 9.0, 9.0  # would end before it begins
    logits[2, 0], logits[7, 1] = 4.0, 5.0
    assert best_span(logits, 1, longest=8)[1:] == (5, 6)
    logits[6, 0] = 0.0
    assert best_span(logits, 1, longest=3)[1:] == (1, 2)
    score, *_ = best_span(logits, 1, longest=3)
    assert score == 13.0


def test_cut_examples_keep_what_they_are_about(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = "number " * 50
    pair = {"sentence1": long, "sentence2": "it is red", "label": "a"}
    [example] = task_of(tokenizer, tmp_path, [pair], kind="pair_classification", labels=["a", "b"]).examples(pair)
    cut = example.cut(32)
    assert len(cut.ids) == 32 and cut.weights.tolist() == [0] * 31 + [1]
    assert tokenizer.decode(cut.ids[cut.ids.tolist().index(tokenizer.eos_id) + 1 :]) == "it is red"

    relation = {"text": f"{long}<e1>cat</e1> eats <e2>dog</e2> {long}", "label": "a"}
    [example] = task_of(tokenizer, tmp_path, [relation], kind="relation_extraction", labels=["a", "b"]).examples(
        relation
    )
    marked = tokenizer.decode(example.cut(48).ids)
    assert "<e1>cat</e1> eats <e2>dog</e2>" in marked
    assert len(example.cut(48).ids) == 48

    words = {"tokens": ["red", "cat"] * 20, "tags": ["O", "B-A"] * 20}
    task = task_of(tokenizer, tmp_path, [words], kind="token_classification")
    [logits] = certain(task, words)
    said = task.predict(words, [logits[:20]]).prediction
    assert len(said) == 40 and "B-A" in said[:20] and set(said[20:]) == {"O"}


def test_marks_are_put_around_entities_and_may_be_control_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = {"text": "a <e1>cat</e1> eats a <e2>dog</e2>", "label": "a"}
    given = {"text": "a cat eats a dog", "subject": [2, 5], "object": [13, 16], "label": "a"}
    task = task_of(tokenizer, tmp_path, [plain], kind="relation_extraction", labels=["a", "b"])
    assert task.examples(plain)[0].ids.tolist() == task.examples(given)[0].ids.tolist()
    control = next(iter(tokenizer.special_tokens))
    row = {"text": f"{control}cat</e1> eats <e2>dog</e2>", "label": "a"}
    settings = {"kind": "relation_extraction", "labels": ["a", "b"], "markers": [control, "</e1>", "<e2>", "</e2>"]}
    assert tokenizer.special_tokens[control] in task_of(tokenizer, tmp_path, [row], **settings).examples(row)[0].ids
    for wrong in ({"text": "a cat", "label": "a"}, given | {"object": [3, 4]}, given | {"object": [13, 99]}):
        with pytest.raises(Refused):
            task.examples(wrong)


def test_entities_may_touch_and_not_overlap(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row: Row = {"text": "张三李四是朋友", "label": "a"}
    task = task_of(tokenizer, tmp_path, [row], kind="relation_extraction", labels=["a", "b"])
    for subject, other, marked in (
        ([0, 2], [2, 4], "<e1>张三</e1><e2>李四</e2>是朋友"),
        ([2, 4], [0, 2], "<e2>张三</e2><e1>李四</e1>是朋友"),
        ([5, 7], [0, 2], "<e2>张三</e2>李四是<e1>朋友</e1>"),
    ):
        assert task.shown(row | {"subject": subject, "object": other}) == marked
    for subject, other in (
        ([0, 2], [2, 2]),
        ([2, 2], [2, 4]),
        ([0, 3], [2, 4]),
        ([0, 4], [2, 4]),
        ([0, 2], [0, 2]),
        ([-2, 2], [2, 4]),
        ([0.0, 2.0], [2, 4]),
        ([False, True], [2, 4]),
        ([0, 2], None),
        ([0, 2, 3], [3, 4]),
        ("ab", [2, 4]),
        (5, [2, 4]),
    ):
        with pytest.raises(Refused, match="^entities that"):
            task.shown(row | {"subject": subject, "object": other})


def test_tags_are_iob2_from_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def opened(*tags: Any, **settings: Any) -> list[str]:
        rows = [{"tokens": ["x"] * len(each), "tags": each} for each in tags]
        return task_of(tokenizer, tmp_path, rows, kind="token_classification", **settings).labels

    assert opened(["O", "B-A"], ["I-A"]) == ["B-A", "I-A", "O"]
    with pytest.raises(MegalmError, match=r"the tag 'PER' of .*rows.jsonl line 2 is not IOB2: write B-TYPE"):
        opened(["O", "B-A"], ["O", "PER"], ["LOC"])
    with pytest.raises(MegalmError, match=r"the tag '3' of .* line 1 is not IOB2: name the tags .* task.labels"):
        opened([3, 0])
    with pytest.raises(MegalmError, match="the tag 'A' of task.labels is not IOB2"):
        opened([1, 0], labels=["O", "A"])
    assert opened([1, 0], labels=["O", "B-A"]) == ["O", "B-A"]


def test_only_rows_that_can_be_read_name_classes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = [{"text": "x", "label": "a"}, {"text": "y", "label": 1}, {"text": "z", "label": True}]
    wrong = [{"text": "x", "label": label} for label in (["a", "b"], float("nan"), 0.5, "", " ", {"a": 1}, "\ud800")]
    rows = [*good, *wrong, {"text": "", "label": "empty"}, {"text": "\ud800", "label": "half"}, {"label": "none"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    data = DataConfig(sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"))])
    task = open_task(TaskConfig(kind="text_classification"), data, tokenizer, 64)
    assert isinstance(task, HeadTask) and task.labels == ["True", "a", "1"]
    found = read_examples(task, tmp_path / "rows.jsonl", 64, "truncate")
    assert len(found) == 3
    for reason in (
        "label is a list, and task.multi_label is not set: 1 (line 4)",
        "a label that is neither text nor a whole number: 3 (line 5, line 6, line 9)",
        "an empty label: 2 (line 7, line 8)",
    ):
        assert reason in found.report
    several = [{"text": "x", "label": ["a", ""]}, {"text": "y", "label": ["b"]}, {"text": "z", "label": "c"}]
    assert task_of(tokenizer, tmp_path, several, kind="text_classification", multi_label=True).labels == ["b"]
    with pytest.raises(MegalmError, match=r"name 0 classes \(none; left out: .*task.multi_label is not set: 2 \("):
        task_of(tokenizer, tmp_path, several[:2], kind="text_classification")
    pair = [{"sentence1": "x", "sentence2": "y", "label": n} for n in (0, 1)]
    half = {"sentence1": "x", "label": 2}
    assert task_of(tokenizer, tmp_path, [*pair, half], kind="pair_classification").labels == ["0", "1"]
    marked = [{"text": "<e1>a</e1><e2>b</e2>", "label": n} for n in (0, 1)]
    rows = [*marked, {"text": "a", "label": 2}, marked[0] | {"subject": [0.0, 2.0], "object": [2, 4], "label": 3}]
    assert task_of(tokenizer, tmp_path, rows, kind="relation_extraction").labels == ["0", "1"]
    words = {"tokens": ["x", "y"], "tags": ["O", "B-A"]}
    broken = [words | {"tags": 5}, words | {"tags": ["B-C"]}, words | {"tags": ["O", ["B-D"]]}, words | {"tokens": 5}]
    assert task_of(tokenizer, tmp_path, [words, *broken], kind="token_classification").labels == ["B-A", "O"]


def test_several_labels_are_right_in_any_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": "x", "label": label} for label in (["a", "b"], ["b", "a", "a"])]
    settings = {"kind": "text_classification", "multi_label": True, "labels": ["b", "c", "a"]}
    task = task_of(tokenizer, tmp_path, rows, **settings)
    answers = [task.predict(row, certain(task, row)) for row in rows]
    assert all(map(is_right, answers)), answers
    assert not any(is_right(task.predict(row, [-logits for logits in certain(task, row)])) for row in rows)


def test_labels_are_found_or_given_and_unknown_ones_are_refused_with_their_line(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"text": "one", "label": 10}, {"text": "two", "label": 9}, {"text": "three", "label": "x"}]
    task = task_of(tokenizer, tmp_path, rows, kind="text_classification")
    assert task.labels == ["x", "9", "10"]
    assert task.facts["labels"] == task.labels
    held_out = write(tmp_path / "held_out.jsonl", [{"text": "one", "label": 9}, {"text": "four", "label": "new"}])
    with pytest.raises(MegalmError, match=r"held_out.jsonl line 2: the label 'new' is none of"):
        read_examples(task, held_out, 64, "truncate")
    named = task_of(tokenizer, tmp_path, rows, kind="text_classification", labels=["no", "yes"])
    assert named.label(1) == named.label("yes") == 1
    with pytest.raises(MegalmError, match="1 classes"):
        task_of(tokenizer, tmp_path, rows[:1], kind="text_classification")
    with pytest.raises(MegalmError, match="task.columns names txt"):
        task_of(tokenizer, tmp_path, rows, kind="text_classification", columns={"txt": "text"})


def test_squads_articles_are_taken_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    question = {"question": "who?", "answers": [{"text": "cat", "answer_start": 4}], "id": "1"}
    article = {"title": "t", "paragraphs": [{"context": "the cat was red", "qas": [question, question | {"id": "2"}]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1", "data": [article]}))
    config = TaskConfig(kind="question_answering")
    task = open_task(config, DataConfig(sources=[SourceConfig(path=str(path))]), tokenizer, 64)
    found = read_examples(task, path, 64, "truncate")
    assert [found.origin(number)[1] for number in range(len(found))] == [1, 2]
