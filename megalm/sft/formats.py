"""Published formats of labelled data as rows: what fine-tuning reads is JSONL with named columns."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date, time
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

from megalm.data import corpus
from megalm.data.python_corpus import docstrings
from megalm.errors import MegalmError
from megalm.sft.read import read_rows
from megalm.sft.task import Refused

Row = dict[str, Any]


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, plain or compressed, without their ends and a byte order mark. Raises MegalmError
    as corpus.read_lines does, and for what is not UTF-8."""
    for number, line in enumerate(corpus.read_lines(path), 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise MegalmError(f"{path}:{number} is not UTF-8 text: convert the file first") from None


Header = Literal["refuse", "skip", "keep"]
"""What becomes of a file's first line: refused if it looks like a header, left out, or taken as data."""
HEADERS: tuple[Header, ...] = get_args(Header)
_LABEL_COLUMN = re.compile(
    "labels?|class|category|target|sentiment|polarity|stars|rating|score|ner|((ner|pos)_)?tags?|标签|类别|分类",
    re.IGNORECASE,
)


def _cells(path: Path, split: Callable[[str], list[str]], header: Header) -> Iterator[tuple[int, str, list[str]]]:
    """Numbered lines, whole and cut into cells of which the last is a label.

    Whether a first line that ends in a name of columns is a header shows at the end of the file: a class comes again,
    as a rule. Raises MegalmError there, as read_lines does elsewhere.
    """
    suspect = None
    for number, line in read_lines(path):
        cells = split(line)
        label = cells[-1].strip() if cells else ""
        if number == 1 and header == "skip":
            continue
        if number == 1 and header == "refuse" and _LABEL_COLUMN.fullmatch(label):
            suspect = label
        elif label == suspect:
            suspect = None
        yield number, line, cells
    if suspect is not None:
        raise MegalmError(
            f"{path}:1 looks like a header (no other line is labelled {suspect!r}): say --header skip to leave it out, "
            "or --header keep if it is a row"
        )


def tsv(paths: Sequence[Path], names: Sequence[str] | None = None, header: Header = "refuse") -> Iterator[Row]:
    """text TAB label -> {text, label}; text TAB text TAB label -> {sentence1, sentence2, label}.

    names: of the classes, where the file holds their numbers.
    """
    for path in paths:
        for number, _, parts in _cells(path, lambda line: line.split("\t"), header):
            if not "".join(parts).strip():
                continue
            if len(parts) not in (2, 3):
                raise MegalmError(
                    f"{path}:{number} has {len(parts)} columns between tabs, not text and label, nor two texts "
                    "and label: correct the line"
                )
            label = parts[-1].strip()
            if names is not None:
                if not label.isdecimal() or int(label) >= len(names):
                    raise MegalmError(
                        f"{path}:{number} says class {label!r}, and the names are numbered 0 to {len(names) - 1}: "
                        f"correct either{', or say --header skip if it is a header' if number == 1 else ''}"
                    )
                label = names[int(label)]
            names_of = ("text",) if len(parts) == 2 else ("sentence1", "sentence2")
            yield {**dict(zip(names_of, parts)), "label": label}


_TAG = re.compile(r"O|[A-Z]-[^\W\d]\S*")
"""IOB2, and its kin with tags for the end of an entity."""


def conll(paths: Sequence[Path], header: Header = "refuse") -> Iterator[Row]:
    """One token and its tag a line (the first and the last column), an empty line between sentences ->
    {tokens, tags}. Lines before a sentence that begin with # and a space are comments, unless they end in a tag."""
    for path in paths:
        tokens, tags = list[str](), list[str]()
        for number, line, parts in _cells(path, lambda line: line.split("\t" if "\t" in line else None), header):
            if not tokens and line.startswith("# ") and not _TAG.fullmatch(parts[-1].strip()):
                continue
            if not "".join(parts).strip() or parts[0].startswith("-DOCSTART-"):
                if tokens:
                    yield {"tokens": tokens, "tags": tags}
                tokens, tags = [], []
            elif len(parts) < 2:
                raise MegalmError(f"{path}:{number} is neither empty nor a token with its tag: correct the line")
            else:
                tokens.append(parts[0])
                tags.append(parts[-1].strip())
        if tokens:
            yield {"tokens": tokens, "tags": tags}


def rows(paths: Sequence[Path]) -> Iterator[Row]:
    """JSON (a list of objects), JSONL or Parquet, as it is, dates as text; SQuAD's articles as a row for each
    question."""
    for path in paths:
        for number, row in read_rows(path):
            if isinstance(row, Refused):
                raise MegalmError(f"{path}:{number} is not a JSON object ({row}): correct the line")
            try:
                content = json.dumps(row, ensure_ascii=False, default=_iso)
                content.encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise MegalmError(
                    f"{path}:{number} cannot be written as JSON ({error}): correct the row, or leave out the column"
                ) from None
            yield json.loads(content)


def _iso(value: Any) -> str:
    if isinstance(value, (date, time)):
        return value.isoformat()
    raise TypeError(f"a value is of the type {type(value).__name__}")


def squad(paths: Sequence[Path]) -> Iterator[Row]:
    """SQuAD's JSON (also CMRC 2018's) -> {id, context, question, answers: {text, answer_start}}."""
    for path in paths:
        found = list(rows([path]))
        if not found:
            raise MegalmError(f"{path} is not in SQuAD's format (it has no question): name another format")
        try:
            for row in found:
                answers = row.get("answers", [])
                yield {
                    "id": str(row["id"]),
                    "context": row["context"],
                    "question": row["question"],
                    "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                }
        except (KeyError, TypeError) as error:
            raise MegalmError(f"{path} is not in SQuAD's format ({error!r}): name another format") from None


_SEMEVAL = re.compile(r'(\d+)\t"(.*)"\s*$')


def semeval(paths: Sequence[Path]) -> Iterator[Row]:
    """SemEval-2010 task 8: a numbered, quoted sentence with <e1> and <e2>, and its relation on the next line ->
    {text, label}."""
    for path in paths:
        above: re.Match[str] | None = None
        for number, line in read_lines(path):
            found = _SEMEVAL.match(line)
            if above is not None:
                if found or not line.strip() or line.startswith("Comment"):
                    raise MegalmError(
                        f"{path}:{number} should name the relation of the sentence above, number {above[1]}: correct it"
                    )
                yield {"text": above[2], "label": line.strip()}
                found = None
            elif not found and re.match(r"\d+\t", line):
                raise MegalmError(f"{path}:{number} is a number without a sentence in quotes: correct it")
            above = found
        if above is not None:
            raise MegalmError(f"{path} ends before the relation of sentence {above[1]}: add the line, or copy it again")


def parallel(paths: Sequence[Path]) -> Iterator[Row]:
    """Two text files whose lines translate each other -> {source, target}."""
    if len(paths) != 2:
        raise MegalmError(f"parallel text is two files, the source and its translation, not {len(paths)}: name both")
    streams = [read_lines(path) for path in paths]
    while True:
        lines = [next(stream, None) for stream in streams]
        if lines[0] is None and lines[1] is None:
            return
        if lines[0] is None or lines[1] is None:
            shorter = paths[0] if lines[0] is None else paths[1]
            raise MegalmError(f"{shorter} has fewer lines than the other file: their lines must translate each other")
        source, target = lines[0][1].strip(), lines[1][1].strip()
        if source and target:
            yield {"source": source, "target": target}


MODULES = 10
"""Classes of python_modules: the modules of which most is said."""


def python_modules(paths: Sequence[Path] = ()) -> Iterator[Row]:
    """No files: sentences of the Python installation's own documentation, and the module each is about ->
    {text, label}."""
    by_module = dict[str, dict[str, None]]()  # an ordered set of each
    for module, heading, docstring in docstrings():
        name = module.split(".")[0].removeprefix("_py").lstrip("_")
        text = _first_paragraph(docstring)
        if 25 < len(text) < 200 and heading.split(".")[-1] not in text:
            by_module.setdefault(name, {})[text] = None
    largest = sorted(by_module, key=lambda name: (-len(by_module[name]), name))[:MODULES]
    said = Counter(text for name in largest for text in by_module[name])
    for name in largest:
        yield from ({"text": text, "label": name} for text in by_module[name] if said[text] == 1)


def python_questions(paths: Sequence[Path] = ()) -> Iterator[Row]:
    """No files: questions about Python's standard library, answered by its documentation -> {messages}."""
    for module, heading, docstring in docstrings():
        text, name = _first_paragraph(docstring), heading.split("(")[0]
        if 25 < len(text) < 400 and not module.startswith("_"):
            question = f"What does {name.removeprefix(f'{module}.')} in Python's module {module} do?"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


def _first_paragraph(docstring: str) -> str:
    return " ".join(docstring.strip().split("\n\n")[0].split())


FORMATS: dict[str, Callable[..., Iterator[Row]]] = {
    "rows": rows,
    "tsv": tsv,
    "conll": conll,
    "squad": squad,
    "semeval": semeval,
    "parallel": parallel,
    "python-modules": python_modules,
    "python-questions": python_questions,
}


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row is kept for the held-out file: by its content, so that the same rows are, in whatever order.

    Rows of one context (questions about a text) go together.
    """
    content = row.get("context") or row
    key = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) < share * 2**64
