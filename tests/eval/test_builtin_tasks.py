"""The harness's own tasks over local files in the schema of the Hub's datasets, with nothing from the net."""

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import transformers
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from megalm.errors import MegalmError
from megalm.eval.harness import report, run_tasks
from tests.eval.test_generate import llama

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("arc", "mmlu/default", "ceval", "cmmlu", "gsm8k", "lambada", "wikitext")
ENGLISH = {"question": "What melts at 0 degrees?", "choices": ["Ice.", "A stone", "The sun", "Salt"]}
CHINESE = {"A": "水", "B": "石头", "C": "007", "D": "None"}


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folders of these tasks alone: reading all of the harness's takes ten seconds each time."""
    root = Path(lm_eval.tasks.__file__).parent
    chosen = sorted(path for folder in FOLDERS for path in (root / folder).glob("**/*.yaml"))
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(lambda _: iter(chosen)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.DictWriter(file, list(rows[0]))
            lines.writeheader()
            lines.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_arc(data: Path) -> None:
    labels = (["A", "B", "C", "D"], ["1", "2", "3", "4"])
    rows = [
        {
            "id": f"q{number}",
            "question": f"{number}? {ENGLISH['question']}",
            "choices": {"text": ENGLISH["choices"], "label": labels[number % 2]},
            "answerKey": labels[number % 2][number],
        }
        for number in range(3)
    ]
    for subset in ("ARC-Easy", "ARC-Challenge"):
        for split in ("train", "validation", "test"):  # as `huggingface-cli download` lays it out
            write(data / "allenai" / "ai2_arc" / subset / f"{split}-00000-of-00001.parquet", rows)


def mmlu_rows(subject: str, answers: list[int]) -> list[dict[str, Any]]:
    return [ENGLISH | {"question": f"{n} {subject}?", "subject": subject, "answer": a} for n, a in enumerate(answers)]


def chinese_rows(subject: str, answers: str, question: str, answer: str) -> list[dict[str, Any]]:
    return [{"id": n, question: f"{n} {subject}是什么？", **CHINESE, answer: a} for n, a in enumerate(answers)]


def write_gsm8k(data: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n}+1=<<{n}+1>>.\n#### {n + 1}"} for n in range(3)]
    for split in ("train", "test"):
        write(data / "openai" / "gsm8k" / "main" / f"{split}.jsonl", rows)


TASKS = [
    "arc_easy",
    "arc_challenge",
    "mmlu_anatomy",
    "ceval-valid_accountant",
    "cmmlu_anatomy",
    "gsm8k",
    "lambada_openai",
    "wikitext",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_arc(folder)
    write_gsm8k(folder)
    for split, answers in (("dev", [0, 3]), ("test", [1, 2])):
        write(folder / "cais" / "mmlu" / "anatomy" / f"{split}-00000-of-00001.parquet", mmlu_rows("anatomy", answers))
    for split, answers in (("dev", "AB"), ("val", "CD")):  # as in the archive of C-Eval
        rows = chinese_rows("accountant", answers, "question", "answer")
        write(folder / "ceval" / "ceval-exam" / split / f"accountant_{split}.csv", rows)
    for split, answers in (("dev", "AB"), ("test", "CD")):  # as in the archive of CMMLU, beside a loading script
        rows = chinese_rows("anatomy", answers, "Question", "Answer")
        write(folder / "haonan-li" / "cmmlu" / split / "anatomy.csv", rows)
    (folder / "haonan-li" / "cmmlu" / "cmmlu.py").write_text("raise RuntimeError\n")
    write(folder / "EleutherAI" / "lambada_openai" / "test.jsonl", [{"text": "He saw a stone , and it was a stone"}])
    pages = [{"page": " = Title = \n\n Stones are hard , and heavy . 2 @.@ 5 kg \n"}]
    folder_of_pages = folder / "EleutherAI" / "wikitext_document_level"
    for split in ("train", "validation", "test"):  # the README says which files are whose
        write(folder_of_pages / "pages" / f"{split}-of-wikitext.jsonl", pages)
    files = "".join(f"  - {{split: {s}, path: pages/{s}-of-wikitext.jsonl}}\n" for s in ("train", "validation", "test"))
    (folder_of_pages / "README.md").write_text(
        f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n"
    )
    return folder


@pytest.fixture(scope="module")
def both(
    make_tokenizer: Callable[..., Path],
    make_model: Callable[..., tuple],
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A checkpoint, and the folder of the same model for transformers."""
    folder = tmp_path_factory.mktemp("both")
    tokenizer = make_tokenizer(folder / "tokenizer")
    model = make_model(max_position_embeddings=512)
    checkpoint = make_checkpoint(folder / "run" / "checkpoints", *model, tokenizer)
    exported = llama(*model)
    exported.generation_config.eos_token_id = 256  # as megalm's export has it
    exported.save_pretrained(folder / "export")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder / "export")
    return checkpoint, folder / "export"


def evaluate(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: object) -> dict[str, Any]:
    """What tools/evaluate_model.py writes."""
    from tools.evaluate_model import main

    options = ("--dtype", "float32", "--device", "cpu", "--bootstrap", 10, "--output", output)
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, (*arguments, *options))])
    monkeypatch.chdir(REPOSITORY)
    main()
    return json.loads(output.read_text())


def same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["task_hashes"] == theirs["task_hashes"] and set(ours["results"]) == set(theirs["results"])
    for task, metrics in ours["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert theirs["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_each_task_scores_as_hugging_face_does(
    both: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, export = both
    options = ("--tasks", *TASKS, "--data", data, "--shots", 1, "--samples")
    ours = evaluate(monkeypatch, tmp_path / "ours.json", "--checkpoint", checkpoint, *options)
    theirs = evaluate(monkeypatch, tmp_path / "theirs.json", "--hf", export, *options)
    same_scores(ours, theirs)
    assert set(ours["results"]) == set(TASKS)
    for task in TASKS:
        mine, other = (
            [json.loads(line) for line in (tmp_path / f"{who}.{task}.jsonl").read_text().splitlines()]
            for who in ("ours", "theirs")
        )
        assert [each["arguments"] for each in mine] == [each["arguments"] for each in other]
        for first, second in zip(mine, other, strict=True):
            answers = json.dumps(first["resps"]), json.dumps(second["resps"])
            if task != "gsm8k":
                numbers = [[float(x) for x in _numbers(json.loads(text))] for text in answers]
                assert numbers[0] == pytest.approx(numbers[1], abs=1e-4), task
            else:
                assert answers[0] == answers[1]
    # what was in the files is what was asked
    (line,) = (tmp_path / "ours.cmmlu_anatomy.jsonl").read_text().splitlines()[:1]
    assert "C. 007\nD. None\n答案：" in json.loads(line)["arguments"][0][0]
    assert ours["results"]["gsm8k"]["exact_match_stderr,strict-match"] is not None


def _numbers(answers: Any) -> Iterator[float]:
    if isinstance(answers, list):
        for each in answers:
            yield from _numbers(each)
    elif isinstance(answers, int | float) and not isinstance(answers, bool):
        yield answers


class AlwaysA(LM):
    """Finds A the likeliest, whatever is asked."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-float(ord(request.args[1].strip()[0])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise AssertionError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise AssertionError


def test_groups_of_subjects(tmp_path: Path) -> None:
    """All subjects of MMLU, C-Eval and CMMLU; the group's score is the share of all questions, of whatever subject."""
    manager = TaskManager()
    right = dict.fromkeys(("mmlu", "ceval-valid", "cmmlu"), 0)
    asked = dict.fromkeys(right, 0)
    for name, entry in manager.task_index.items():
        group = name.partition("_")[0]
        if not entry.yaml_path or group not in right or "dataset_name" not in (entry.cfg or {}):
            continue
        subject = entry.cfg["dataset_name"]
        answers = "ABCD"[: 2 + len(subject) % 3] + "A" * (len(subject) % 2)
        right[group] += answers.count("A")
        asked[group] += len(answers)
        if group == "mmlu":
            folder, splits = tmp_path / "cais" / "mmlu" / subject, ("dev", "test")
            for split in splits:
                write(folder / f"{split}.jsonl", mmlu_rows(subject, ["ABCD".index(each) for each in answers]))
        elif group == "cmmlu":
            for split in ("dev", "test"):
                path = tmp_path / "haonan-li" / "cmmlu" / split / f"{subject}.csv"
                write(path, chinese_rows(subject, answers, "Question", "Answer"))
        else:
            for split in ("dev", "val"):
                path = tmp_path / "ceval" / "ceval-exam" / split / f"{subject}_{split}.csv"
                write(path, chinese_rows(subject, answers, "question", "answer"))
    found = run_tasks(AlwaysA(), list(right), data=tmp_path)
    assert found is not None
    assert len(found["samples"]) == 57 + 52 + 67
    about = {"checkpoint": {"path": "RUN/checkpoints/step-1", "fingerprint": "0123456789"}}
    kept, table = report(found, about)
    for group in right:
        assert 0 < right[group] < asked[group]
        assert kept["groups"][group]["acc,none"] == pytest.approx(right[group] / asked[group])
        assert 0 < kept["groups"][group]["acc_stderr,none"] < 0.1
        assert len(kept["task_hashes"][group]) == len(kept["task_hashes"]["mmlu_anatomy"])
        (line,) = (line for line in table.splitlines() if line.split()[0] == group and " acc " in line)
        assert kept["task_hashes"][group][:8] in line
    assert "mmlu_stem" in kept["groups"] and kept["task_hashes"]["mmlu_stem"] != kept["task_hashes"]["mmlu"]
    assert "fingerprint 01234567; lm-evaluation-harness " in table.splitlines()[-1]


def test_what_is_missing(data: Path, tmp_path: Path) -> None:
    def refused(task: str, folder: Path) -> str:
        with pytest.raises(MegalmError) as refusal:
            run_tasks(AlwaysA(), [task], data=folder)
        return str(refusal.value)

    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    mmlu = copy / "cais" / "mmlu"
    (mmlu / "anatomy" / "dev-00000-of-00001.parquet").unlink()
    advice = ": see docs/evaluation.md for files and columns"
    assert refused("mmlu_anatomy", copy) == (
        f"mmlu_anatomy needs the split dev of the dataset cais/mmlu (subset anatomy), and {mmlu} has only test{advice}"
    )
    assert f"mmlu_astronomy needs the dataset cais/mmlu (subset astronomy), and {mmlu} has no files of it by name" in (
        refused("mmlu_astronomy", copy)
    )
    assert refused("gsm8k", tmp_path) == (
        f"gsm8k needs the dataset openai/gsm8k (subset main), and there is no folder {tmp_path}/openai/gsm8k{advice}"
    )
    write(copy / "openai" / "gsm8k" / "main" / "test.csv", [{"question": "q", "answer": "a"}])
    (copy / "openai" / "gsm8k" / "main" / "test.jsonl").unlink()
    assert "the files of gsm8k" in refused("gsm8k", copy)
    write(copy / "EleutherAI" / "lambada_openai" / "test.jsonl", [{"line": "no text"}])
    assert "the data of lambada_openai cannot be read" in refused("lambada_openai", copy)
