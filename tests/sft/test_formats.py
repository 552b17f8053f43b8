"""Published formats become rows, and what is not in the format is refused by file and line."""

import gzip
import json
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import MegalmError
from megalm.sft import formats

CONLL = "-DOCSTART- -X- O\n\nParis NNP B-LOC\nis VBZ O\n\n\nAnna\tB-PER\nBell\tI-PER\n"
SEMEVAL = (
    '1\t"An <e1>engine</e1> of a "fast" <e2>car</e2>."\nComponent-Whole(e1,e2)\nComment: none\n\n'
    '2\t"The <e1>a</e1> and <e2>b</e2>."\nOther\nComment:\n'
)
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "生命数耗完即算为踢爆。",
                    "qas": [
                        {"id": 7, "question": "算为什么？", "answers": [{"text": "踢爆", "answer_start": 8}]},
                        {"id": "b", "question": "谁？"},
                    ],
                }
            ]
        }
    ]
}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_tsv_of_one_text_or_two(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "good film\tpos\r\n\nbad\tneg\nis it?\tit is\tyes\n")
    assert list(formats.tsv([path])) == [
        {"text": "good film", "label": "pos"},
        {"text": "bad", "label": "neg"},
        {"sentence1": "is it?", "sentence2": "it is", "label": "yes"},
    ]


def test_tsv_with_numbered_classes(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "x\t1\ny\t0\n")
    assert [row["label"] for row in formats.tsv([path], ["no", "yes"])] == ["yes", "no"]
    with pytest.raises(MegalmError, match=r"a\.tsv:1 says class '1'"):
        list(formats.tsv([path], ["no"]))
    with pytest.raises(MegalmError, match=r"b\.tsv:1 says class '²'"):
        list(formats.tsv([written(tmp_path, "b.tsv", "x\t²\n")], ["no", "yes", "maybe"]))


def test_conll_with_and_without_columns_between(tmp_path: Path) -> None:
    assert list(formats.conll([written(tmp_path, "a.conll", CONLL)])) == [
        {"tokens": ["Paris", "is"], "tags": ["B-LOC", "O"]},
        {"tokens": ["Anna", "Bell"], "tags": ["B-PER", "I-PER"]},
    ]


def test_comments_before_a_sentence_of_conll_are_no_tokens(tmp_path: Path) -> None:
    """MultiCoNER's and CoNLL-U's; a token # is one."""
    for gap in (" ", "\t"):
        lines = f"# id 5e0e{gap}domain=en\n# text = # vitamin B-12\n#{gap}_{gap}_{gap}O\nx{gap}_{gap}_{gap}B-GRP\n"
        path = written(tmp_path, "a.conll", f"{lines}\n\n# id 5e0f{gap}domain=en\nParis{gap}_{gap}_{gap}B-LOC\n")
        assert list(formats.conll([path])) == [
            {"tokens": ["#", "x"], "tags": ["O", "B-GRP"]},
            {"tokens": ["Paris"], "tags": ["B-LOC"]},
        ]
    numbers = written(tmp_path, "b.conll", "No NN\n# SYM\n5 CD\n\n#\tSYM\n5\tCD\n")
    assert [row["tokens"] for row in formats.conll([numbers])] == [["No", "#", "5"], ["#", "5"]]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, mark: str) -> None:
    """Windows' programs write one."""
    rows = written(tmp_path, "a.tsv", f"{mark}good\tpos\nbad \ufeffx\tneg\n")
    assert [row["text"] for row in formats.tsv([rows])] == ["good", "bad \ufeffx"]
    words = written(tmp_path, "a.conll", f"{mark}EU B-ORG\n")
    assert list(formats.conll([words])) == [{"tokens": ["EU"], "tags": ["B-ORG"]}]
    assert len(list(formats.semeval([written(tmp_path, "a.txt", mark + SEMEVAL)]))) == 2
    lines = [written(tmp_path, name, f"{mark}{name}\n") for name in ("en", "zh.gz")]
    assert list(formats.parallel(lines)) == [{"source": "en", "target": "zh.gz"}]
    assert list(formats.rows([written(tmp_path, "a.jsonl", mark + '{"a": 1}\n')])) == [{"a": 1}]


@pytest.mark.parametrize(
    ("read", "header", "data"),
    [
        (formats.tsv, "\ufeffsentence\tlabel\r\n", "good\t1\r\nbad\t0\r\n"),
        (formats.tsv, "sentence1\tsentence2\tLabel\n", "a\tb\tyes\n"),
        (formats.tsv, "文本\t标签\n", "好\t褒\n"),
        (formats.conll, "token tag\n", "EU B-ORG\nrejects O\n"),
        (formats.conll, "word\tner_tags\n\n", "EU\tB-ORG\n"),
    ],
)
def test_a_header_is_refused_or_left_out_of_each_file(tmp_path: Path, read: object, header: str, data: str) -> None:
    plain, headed = written(tmp_path, "plain", data), written(tmp_path, "headed", header + data)
    expected = list(read([plain]))  # type: ignore[operator]
    with pytest.raises(MegalmError, match=r"headed:1 looks like a header .*--header skip .*--header keep"):
        list(read([plain, headed]))  # type: ignore[operator]
    assert list(read([headed, headed], header="skip")) == 2 * expected  # type: ignore[operator]
    assert header.split()[-1] in str(list(read([headed], header="keep"))[0])  # type: ignore[operator]


def test_a_class_that_comes_first_is_no_header(tmp_path: Path) -> None:
    """Neither if it is rare, nor if it has the name of a column and comes again."""
    for labels in ("rare a a", "class method class", "x label"):
        path = written(tmp_path, "a.tsv", "".join(f"text {n}\t{label}\n" for n, label in enumerate(labels.split())))
        assert [row["label"] for row in formats.tsv([path])] == labels.split()


def test_a_header_before_numbered_classes(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "review\tstars\nx\t1\n")
    with pytest.raises(MegalmError, match=r"a\.tsv:1 says class 'stars'.*or say --header skip if it is a header"):
        list(formats.tsv([path], ["no", "yes"]))
    assert [row["label"] for row in formats.tsv([path], ["no", "yes"], "skip")] == ["yes"]


def test_semeval(tmp_path: Path) -> None:
    assert list(formats.semeval([written(tmp_path, "a.txt", SEMEVAL)])) == [
        {"text": 'An <e1>engine</e1> of a "fast" <e2>car</e2>.', "label": "Component-Whole(e1,e2)"},
        {"text": "The <e1>a</e1> and <e2>b</e2>.", "label": "Other"},
    ]


def test_squad_with_and_without_answers(tmp_path: Path) -> None:
    first, second = formats.squad([written(tmp_path, "a.json", json.dumps(SQUAD))])
    [text], [start] = first["answers"]["text"], first["answers"]["answer_start"]
    assert first["id"] == "7" and first["context"][start : start + len(text)] == text
    assert second["answers"] == {"text": [], "answer_start": []}


def test_lines_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match=r"file\.jsonl:2 is not a JSON object"):
        list(formats.rows([written(tmp_path, "file.jsonl", '{"a": 1}\n[]\n')]))


def test_rows_as_they_are(tmp_path: Path) -> None:
    whole, lines = written(tmp_path, "a.json", '[{"a": 1}, {"b": "二"}]'), written(tmp_path, "a.jsonl", '{"c": 3}\n\n')
    assert list(formats.rows([whole, lines])) == [{"a": 1}, {"b": "二"}, {"c": 3}]


def test_rows_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match=r"a\.jsonl:2 cannot be written as JSON \(.*surrogates not allowed"):
        list(formats.rows([written(tmp_path, "a.jsonl", '{"a": 1}\n{"a": "\\ud800"}\n')]))
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")

    def read(*rows: dict[str, Any]) -> list[formats.Row]:
        parquet.write_table(pyarrow.Table.from_pylist([*rows]), tmp_path / "a.parquet")
        return list(formats.rows([tmp_path / "a.parquet"]))

    dated = {"day": date(2024, 1, 2), "at": [datetime(2024, 1, 2, 3, 4)]}
    assert read(dated) == [{"day": "2024-01-02", "at": ["2024-01-02T03:04:00"]}]
    with pytest.raises(MegalmError, match=r"a\.parquet:2 cannot be written as JSON \(a value is of the type bytes\)"):
        read({"image": None}, {"image": b"x"})


def test_parallel_text(tmp_path: Path) -> None:
    source, target = written(tmp_path, "a.en.gz", "one\n\ntwo\n"), written(tmp_path, "a.de", "eins\nleer\nzwei\n")
    assert list(formats.parallel([source, target])) == [
        {"source": "one", "target": "eins"},
        {"source": "two", "target": "zwei"},
    ]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (formats.tsv, "no tab\n", r"file:1 has 1 columns"),
        (formats.conll, "Anna\n", r"file:1 is neither"),
        (formats.squad, "[]", "not in SQuAD's format"),
        (formats.semeval, '1\t"a"\n\n', r"file:2 should name the relation"),
        (formats.semeval, '8\t"a"\n9\t"b"\nOther\n', r"file:2 should name the relation of .* above, number 8"),
        (formats.semeval, '8\t"a"\nComment:\n', r"file:2 should name the relation"),
        (formats.semeval, SEMEVAL + '3\t"a"\n', r"file ends before the relation of sentence 3"),
        (formats.semeval, "3\ta\nOther\n", r"file:1 is a number without a sentence in quotes"),
        (formats.parallel, "a\n", "two files"),
    ],
)
def test_what_is_not_in_the_format_is_refused(tmp_path: Path, read: object, text: str, message: str) -> None:
    with pytest.raises(MegalmError, match=message):
        list(read([written(tmp_path, "file", text)]))  # type: ignore[operator]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    longer, shorter = written(tmp_path, "a", "1\n2\n"), written(tmp_path, "b", "1\n")
    with pytest.raises(MegalmError, match="b has fewer lines"):
        list(formats.parallel([longer, shorter]))
    latin = tmp_path / "latin"
    latin.write_bytes(b"a\tb\ncaf\xe9\tc\n")
    with pytest.raises(MegalmError, match="is not UTF-8"):
        list(formats.tsv([latin]))
    short = written(tmp_path, "a.gz", "text\tlabel\n" * 1000)
    short.write_bytes(short.read_bytes()[:-10])
    with pytest.raises(MegalmError, match=r"a\.gz is damaged or cut short"):
        list(formats.tsv([short]))


def test_questions_about_one_text_are_held_out_together() -> None:
    rows = [{"context": f"text {n // 4}", "question": str(n)} for n in range(400)]
    held = [formats.is_held_out(row, 0.3) for row in rows]
    assert all(len(set(held[start : start + 4])) == 1 for start in range(0, 400, 4))
    assert 0.15 < sum(held) / len(held) < 0.45
    assert [formats.is_held_out(row, 0.3) for row in reversed(rows)] == held[::-1]
    parts = [{"context": [["title", [row["context"]]]], "question": row["question"]} for row in rows]
    held = [formats.is_held_out(row, 0.3) for row in parts]  # as HotpotQA has them
    assert all(len(set(held[start : start + 4])) == 1 for start in range(0, 400, 4)) and 0 < sum(held) < 400


def test_rows_about_python_itself() -> None:
    rows = list(formats.python_modules())
    labels = {row["label"] for row in rows}
    assert len(rows) > 1000 and len(labels) == formats.MODULES and {"tkinter", "asyncio", "email"} <= labels
    assert len({row["text"] for row in rows}) == len(rows), "a sentence stands for one class only"
    questions = list(formats.python_questions())
    assert len(questions) > 2000
    [asked] = [row for row in questions if "What does dumps in Python's module json do?" in str(row)]
    assert asked["messages"][1]["content"].startswith("Serialize ``obj`` to a JSON formatted")


def test_the_command_parts_rows_and_says_how_many(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", "".join(f"text {n}\t{n % 2}\n" for n in range(300)))
    names = written(tmp_path, "names.txt", "no\nyes\n")
    command = [sys.executable, "tools/prepare_rows.py", "tsv", str(path), "--output", str(tmp_path / "rows")]
    said = subprocess.run([*command, "--names", str(names)], capture_output=True, text=True, check=True).stdout
    parts = {
        name: [json.loads(line) for line in (tmp_path / "rows" / f"{name}.jsonl").open()]
        for name in ("train", "held_out")
    }
    assert f"{len(parts['train'])} rows to train on, {len(parts['held_out'])} held out" in said
    assert sorted(int(row["text"].split()[1]) for part in parts.values() for row in part) == list(range(300))
    assert 10 < len(parts["held_out"]) < 60
    text = path.read_text()
    path.write_text("")
    empty = subprocess.run(command, capture_output=True, text=True)
    assert empty.returncode == 2 and empty.stderr.startswith(f"error: {path} holds no row: name files with rows")
    kept = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "rows").iterdir()}
    assert kept == {f"{name}.jsonl": len(rows) for name, rows in parts.items()}, "the rows from before, and no more"
    path.write_text(text)
    subprocess.run([*command, "--held-out", "0", "--header", "skip"], check=True)
    assert (tmp_path / "rows" / "train.jsonl").read_text().count("\n") == 299
    wrong = subprocess.run([*command, "--held-out", "1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "is not a share" in wrong.stderr
