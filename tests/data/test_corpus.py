"""Corpora: what is in the files is in the corpus, and what is left out is counted."""

import errno
import gzip
import json
import os
import pydoc
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import zstandard

from megalm.data.corpus import Document, JsonlReader, Tally, gather, split_text, write_corpus
from megalm.data.python_corpus import gather_python
from megalm.errors import MegalmError


def frames(content: bytes) -> bytes:
    """Several zstd frames, as parallel compressors write them."""
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    """A folder of every kind of file."""
    root = tmp_path / "tree"
    (root / "b").mkdir(parents=True)
    (root / "b" / "note.md").write_text("# Title\r\n\tbody\n", newline="")
    (root / "a.txt").write_text("\ufeffwith a mark")
    (root / "c.txt.gz").write_bytes(gzip.compress("gzip текст".encode()))
    (root / "d.rst.zst").write_bytes(frames("zstd 文本".encode() * 1000))
    lines = [json.dumps({"text": f"line {i}", "source": f"s{i}"}) for i in range(3)]
    (root / "e.jsonl").write_text("\n".join([*lines, '{"body": 1}', "{", '{"text": "  "}']))
    (root / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from gzip"}\n'))
    (root / "g.jsonl.zst").write_bytes(frames(b'{"text": "from zstd"}\n{"text": "and more"}'))
    (root / "h.txt").write_bytes(b"\xff\xfe\xfa")
    (root / "i.txt").write_bytes(b"zero\0zero")
    (root / "j.txt").write_text(" \n")
    (root / "k.txt").write_text("with a mark")
    (root / "l.jpeg").write_text("other")
    return root


def test_gather_and_write(tree: Path, tmp_path: Path) -> None:
    tally = Tally()
    output = tmp_path / "corpus.jsonl"
    write_corpus(gather([tree], tally), output, tally)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["text"] for record in records] == [
        "with a mark",
        "gzip текст",
        "zstd 文本" * 1000,
        "line 0",
        "line 1",
        "line 2",
        "from gzip",
        "from zstd",
        "and more",
        "# Title\r\n\tbody\n",
    ]
    assert records[0]["source"] == str(tree / "a.txt")
    assert records[3]["source"] == "s0"
    assert tally.skipped == {
        "without a text field 'text'": 1,
        "not JSON": 1,
        "empty": 2,
        "not UTF-8": 1,
        "binary": 1,
        "repeated": 1,
        "of another extension": 1,
    }
    assert tally.documents == len(records)
    assert tally.characters == sum(len(record["text"]) for record in records)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_written_twice_is_the_same_and_reads_back(tree: Path, tmp_path: Path, suffix: str) -> None:
    for name in ("first", "second"):
        tally = Tally()
        write_corpus(gather([tree], tally), tmp_path / f"{name}{suffix}", tally)
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    assert first.read_bytes() == second.read_bytes()
    reader = JsonlReader([first], Tally())
    documents = list(reader)
    assert reader.bytes_read == reader.total_bytes == first.stat().st_size
    again = Tally()
    assert documents == list(JsonlReader([second], again))
    assert [document.text for document in documents][:2] == ["with a mark", "gzip текст"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, second.name, "tree"])


def test_folders_hold_what_no_file_named_directly_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for folder in (tree / "locked", elsewhere):
        folder.mkdir(parents=True)
    (elsewhere / "linked.txt").write_text("in a folder that is a link")
    (tree / "folder").symlink_to(elsewhere)
    (tree / "folder_again").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(tree)
    (tree / "broken.txt").symlink_to(tree / "nothing")
    (tree / "self.txt").symlink_to(tree / "self.txt")
    (tree / "file.txt").symlink_to(elsewhere / "linked.txt")
    os.mkfifo(tree / "pipe.txt")
    (tree / "secret.txt").write_text("no one may read this")
    (tree / "z.txt").write_text("after all of them")
    path_open, scandir = Path.open, os.scandir

    def allowed(path: Any) -> Any:  # chmod does not stop root
        if str(path).endswith(("secret.txt", "locked")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path

    monkeypatch.setattr(Path, "open", lambda path, *given: path_open(allowed(path), *given))
    monkeypatch.setattr(os, "scandir", lambda path: scandir(allowed(path)))
    tally = Tally()
    assert [(d.text, d.source) for d in gather([tree], tally)] == [
        ("in a folder that is a link", str(tree / "file.txt")),
        ("after all of them", str(tree / "z.txt")),
        ("in a folder that is a link", str(tree / "folder" / "linked.txt")),
    ]
    assert tally.skipped == {"links to folders already read": 2, "unreadable folders": 1, "unreadable files": 4}
    for named, message in (("secret.txt", "cannot read"), ("locked", "cannot read the folder"), ("broken.txt", "no f")):
        with pytest.raises(MegalmError, match=message):
            list(gather([tree / named], Tally()))


def test_deeply_nested_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000 + "]" * 100_000 + '\n{"text": "after it"}\n')
    tally = Tally()
    assert [document.text for document in gather([path], tally)] == ["after it"]
    assert tally.skipped == {"not JSON": 1}


def test_groups_are_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    documents = [Document("a", "s", "together"), Document("b", "s", "together"), Document("c", "s")]
    write_corpus(documents, path, Tally())
    assert list(JsonlReader([path], Tally())) == documents
    assert [sorted(json.loads(line)) for line in path.read_text().splitlines()][1:] == [
        ["group", "source", "text"],
        ["source", "text"],
    ]


def test_options(tree: Path) -> None:
    def texts(inputs: list[Path], **options: object) -> list[str]:
        return [document.text for document in gather(inputs, Tally(), **options)]  # type: ignore[arg-type]

    assert texts([tree], extensions=["jpeg"])[-1] == "other"
    assert texts([tree / "l.jpeg"]) == ["other"]
    assert texts([tree / "k.txt", tree / "a.txt"]) == ["with a mark"] * 2
    (tree / "m.jsonl").write_text('{"body": "in another field"}\n')
    assert texts([tree / "m.jsonl"], text_field="body") == ["in another field"]
    with pytest.raises(MegalmError, match="no file or folder"):
        texts([tree / "none"])


def test_long_text_is_cut_without_loss() -> None:
    text = "".join(topics.values())
    parts = list(split_text(text, 10_000))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 10_000
    assert sum(part.endswith("\n\n") for part in parts) > 0.9 * len(parts)
    assert ["".join(part) for part in split_text("x" * 25, 10)] == ["x" * 10, "x" * 10, "x" * 5]
    assert list(split_text("short", 10)) == ["short"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("f.jsonl.gz", lambda content: content[:-9]),
        ("g.jsonl.zst", lambda content: content[:-3]),
        ("c.txt.gz", lambda content: content[:-9]),
        ("d.rst.zst", lambda content: content[:-3]),
        ("c.txt.gz", lambda content: b"not gzip"),
        ("g.jsonl.zst", lambda content: b"not zstd at all"),
        ("f.jsonl.gz", lambda content: content[:12] + bytes([content[12] ^ 255]) + content[13:]),
    ],
)
def test_damaged_compressed_files_are_refused(tree: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = tree / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MegalmError, match=f"{re.escape(name)} is damaged or cut short"):
        list(gather([path], Tally()))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    documents = [Document("text", "source")]
    with pytest.raises(MegalmError, match="must be named"):
        write_corpus(documents, tmp_path / "corpus.txt", Tally())
    with pytest.raises(MegalmError, match="no document was found"):
        write_corpus([], tmp_path / "corpus.jsonl", Tally())
    (tmp_path / "file").write_text("")
    with pytest.raises(MegalmError, match="cannot write"):
        write_corpus(documents, tmp_path / "file" / "corpus.jsonl", Tally())
    with pytest.raises(MegalmError, match="is not a corpus"):
        JsonlReader([tmp_path / "file"], Tally())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_writer_leaves_the_earlier_corpus(tmp_path: Path) -> None:
    output = tmp_path / "corpus.jsonl"
    write_corpus([Document("earlier", "")], output, Tally())

    def interrupted() -> Iterator[Document]:
        yield Document("later", "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(interrupted(), output, Tally())
    assert "earlier" in output.read_text()
    assert list(tmp_path.iterdir()) == [output]


def test_python_topics_and_reference_pages() -> None:
    tally = Tally()
    documents = {document.source: document.text for document in gather_python(tally, ["topics", "docstrings"])}
    assert documents["python/topics/assert"] == topics["assert"]
    page = documents["python/reference/textwrap"]
    assert pydoc.getdoc(textwrap.dedent).split("\n")[-1].strip(" #") in page
    assert "textwrap.dedent(text)" in page
    assert "import re" not in page
    assert "Return the arc cosine" in documents["python/reference/math"]
    assert not any(".test" in source for source in documents)
    assert sum(map(len, documents.values())) > 1_500_000
    again = {document.source: document.text for document in gather_python(Tally(), ["topics", "docstrings"])}
    assert again == documents


def test_documents_of_one_python_module_are_one_group() -> None:
    """The docstrings of a module stand in its reference page and in its source."""
    documents = list(gather_python(Tally()))
    assert all(document.group for document in documents if "/topics/" not in document.source)
    groups: dict[str, set[str]] = {}
    for document in documents:
        groups.setdefault(document.group or document.source, set()).add(document.source)
    assert groups["python/textwrap"] == {"python/textwrap.py", "python/reference/textwrap"}
    assert groups["python/email"] == {"python/email/__init__.py", "python/reference/email"}
    assert groups["python/decimal"] >= {"python/decimal.py", "python/_pydecimal.py", "python/reference/_pydecimal"}
    assert len(groups) > 300

    def share_found_elsewhere(group: Callable[[Document], str]) -> float:
        """Lines of reference pages that another group holds too."""
        holders: dict[str, set[str]] = {}
        for document in documents:
            for line in document.text.split("\n"):
                holders.setdefault(line.strip(), set()).add(group(document))
        lines = [
            line.strip()
            for document in documents
            if "python/reference/" in document.source
            for line in document.text.split("\n")
            if len(line) > 40
        ]
        return sum(len(holders[line]) > 1 for line in lines) / len(lines)

    assert share_found_elsewhere(lambda document: document.source) > 0.6
    assert share_found_elsewhere(lambda document: document.group or document.source) < 0.15


def test_python_sources_are_the_files() -> None:
    sources = {}
    for document in gather_python(Tally(), ["sources"]):
        sources[document.source] = sources.get(document.source, "") + document.text
    assert sources["python/textwrap.py"] == Path(textwrap.__file__).read_text(encoding="utf-8")
    assert sum(map(len, sources.values())) > 5_000_000
    with pytest.raises(MegalmError, match="no part 'everything'"):
        next(gather_python(Tally(), ["everything"]))
