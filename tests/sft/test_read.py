"""Files of rows: formats, and what is counted by reason and line."""

import gzip
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megalm.data.config import DataConfig, SourceConfig
from megalm.data.examples import Example, ExampleSet
from megalm.errors import MegalmError
from megalm.sft.config import TaskConfig
from megalm.sft.open import FORMAT, check_rows, keep_examples, open_task
from megalm.sft.read import read_examples, read_rows
from megalm.sft.task import Task
from megalm.tokenizer.base import Tokenizer
from tests.sft.conftest import write_rows

ROWS = [{"text": f"row {n}", "n": n} for n in range(5)]


@pytest.fixture
def task(tokenizer_folder: Path, tokenizer: Tokenizer) -> Task:
    return open_task(TaskConfig(kind="continuation"), DataConfig(tokenizer=str(tokenizer_folder)), tokenizer, 64)


def test_formats_hold_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS}))
    paths = sorted(tmp_path.iterdir())
    try:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
        paths.append(tmp_path / "a.parquet")
    except ImportError:
        pass
    for path in paths:
        assert list(read_rows(path)) == list(enumerate(ROWS, start=1)), path


def test_what_is_left_out_is_counted_with_its_lines(task: Task, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"text": "good"},
            "{bad",
            "",
            {"text": " "},
            {"text": "good"},
            "[1]",
            '{"text": "\\ud800"}',
            {"other": 1},
            *({"text": " " * n} for n in range(2, 6)),
            {"text": "x" * 200},
        ],
    )
    examples = read_examples(task, path, 64, "truncate")
    assert examples.report == (
        f"{path}: 2 examples of 12 rows, {examples.weights.sum()} of {len(examples.ids)} tokens trained; "
        "an empty text: 5 (line 4, line 9, line 10, ...); cut to 64 tokens: 1 (line 13); duplicate: 1 (line 5); "
        "no column text: 1 (line 8); not JSON: 1 (line 2); not Unicode (lone surrogates): 1 (line 7); "
        "not an object: 1 (line 6)"
    )
    assert [examples.origin(n) for n in range(2)] == [(str(path), 1), (str(path), 13)]
    assert examples.lengths.tolist()[1] == 64
    dropped = read_examples(task, path, 64, "drop")
    assert len(dropped) == 1 and "longer than 64 tokens: 1 (line 13)" in dropped.report
    with pytest.raises(MegalmError, match=r"rows.jsonl line 13: the example has \d+ tokens and train.sequence_length"):
        read_examples(task, path, 64, "refuse")


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Python's own: libraries that other tests use raise it for the whole process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("usual_recursion_limit")
def test_values_of_the_wrong_type_are_counted(tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    deep = [
        [good[0], good[1] | {"tool_calls": [{"function": {"name": "f", "arguments": "[" * depth + "]" * depth}}]}]
        for depth in (700, 2000)
    ]
    wrong = [[good[0] | {"role": ["user"]}, good[1]], [good[0], good[1] | {"tool_calls": True}], *deep]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages} for messages in (good, *wrong)])
    task = open_task(TaskConfig(template="qwen"), DataConfig(tokenizer=str(tokenizer_folder)), tokenizer, 64)
    examples = read_examples(task, path, 64, "truncate")
    assert len(examples) == 1
    for line in range(2, 6):
        assert f"1 (line {line})" in examples.report


def test_a_folder_is_its_files(task: Task, tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"text": "b"}, {"text": "a"}])
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "README.md").write_text("not rows")
    examples = read_examples(task, tmp_path, 64, "truncate")
    assert [examples.origin(n) for n in range(2)] == [(str(tmp_path / "a.jsonl"), 1), (str(tmp_path / "b.jsonl"), 1)]
    assert f"duplicate: 1 ({tmp_path / 'b.jsonl'} line 2)" in examples.report


class Silent:
    facts: Mapping[str, Any] = {}

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        zeros = np.zeros(3, int)
        return [Example(zeros, zeros, zeros)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "rows.jsonl",
            '{"other": 1}\n',
            r"none of the 1 rows of .* can be trained on \(no column text: 1 \(line 1\)\)",
        ),
        ("rows.jsonl", "", "can be trained on .it is empty"),
        ("rows.json", "{", "is not JSON"),
        ("rows.json", '{"a": 1}', "neither a list of rows nor an object whose `data` is one"),
        ("rows.parquet", "no", "cannot be read as Parquet|takes pyarrow"),
        ("rows.csv", "a,b", "is not a file of rows"),
        (None, "", "there is no file of rows"),
    ],
)
def test_files_that_do_not_serve_are_refused_early(
    name: str | None, content: str, sentence: str, task: Task, tmp_path: Path
) -> None:
    path = tmp_path / (name or "nothing.jsonl")
    if name:
        path.write_text(content)
    with pytest.raises(MegalmError, match=sentence):
        check_rows(task, DataConfig(sources=[SourceConfig(path=str(path))]), 64)


def test_an_all_zero_mask_is_no_example(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(MegalmError, match="nothing in it is trained: 5"):
        read_examples(Silent(), path, 64, "truncate")


def test_many_classes_take_room_for_trained_positions_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{n} " + "x" * 90, "label": ["3", str(n)]} for n in range(9)])
    config = TaskConfig(kind="text_classification", multi_label=True, labels=[str(n) for n in range(1000)])
    examples = read_examples(open_task(config, DataConfig(), tokenizer, 64), path, 64, "truncate")
    assert len(examples.ids) == 9 * 64 and examples.labels.shape == (9, 1000)
    assert [np.flatnonzero(examples[n].placed_labels[-1]).tolist() for n in (0, 3, 5)] == [[0, 3], [3], [3, 5]]
    assert not any(each.placed_labels[:-1].any() for each in map(examples.__getitem__, range(9)))


def test_arrays_of_an_earlier_format_are_made_anew(
    task: Task, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    settings = (task, TaskConfig(kind="continuation"), str(path), tokenizer, 64, tmp_path / "examples")
    kept = keep_examples(*settings)
    assert FORMAT > 1, "1 had labels of several classes for every position"
    monkeypatch.setattr("megalm.sft.open.FORMAT", 1)
    assert keep_examples(*settings) != kept


def test_examples_are_made_once(task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = TaskConfig(kind="continuation")

    def kept(config: TaskConfig = config, length: int = 64) -> Path:
        return keep_examples(task, config, str(path), tokenizer, length, tmp_path / "examples")

    first = kept()
    before = (first / "ids.npy").stat().st_mtime_ns
    assert kept() == first and (first / "ids.npy").stat().st_mtime_ns == before
    assert len(ExampleSet.load(first)) == 5
    assert len({first, kept(length=65), kept(TaskConfig(kind="continuation", long_examples="drop"))}) == 3
    write_rows(path, ROWS[:4])
    assert kept() != first, "other rows are other examples"
