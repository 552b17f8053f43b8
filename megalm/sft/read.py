"""Rows of labelled data, from files to examples: what cannot be trained on is counted by reason, with its lines."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megalm.data.corpus import content_suffix, read_lines
from megalm.data.examples import Example, ExampleSet
from megalm.errors import MegalmError
from megalm.sft.task import Refused, Task

FORMATS = (".jsonl", ".json", ".parquet")
"""Of files of rows; the first two also compressed (.gz, .zst)."""
LINES_SHOWN = 3
"""Places that the report names for each reason."""
_TOO_DEEP = "nested too deep"


def row_files(path: str | Path) -> list[Path]:
    """The file of rows `path`, or those of a folder, sorted. Raises MegalmError if there is none."""
    path = Path(path)
    if not path.exists():
        raise MegalmError(f"there is no file of rows {path}: correct the path in data.sources or data.held_out")
    found = sorted(each for each in path.iterdir() if content_suffix(each) in FORMATS) if path.is_dir() else [path]
    if not found or content_suffix(found[0]) not in FORMATS:
        where = f"{path} holds no file of rows" if path.is_dir() else f"{path} is not a file of rows"
        raise MegalmError(f"{where}: fine-tuning reads {', '.join(FORMATS)} (the first two also as .gz or .zst)")
    return found


def row_word(path: Path) -> str:
    """What read_rows() counts in a file."""
    return "line" if content_suffix(path) == ".jsonl" else "row"


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Refused]]:
    """The rows of one file, each with its line (JSONL) or its number (JSON, Parquet), from 1; or why it is none.

    A JSON file is a list, or an object whose `data` is one, and is held in memory whole. SQuAD's articles are taken
    apart: each question is a row.
    Raises MegalmError if the file cannot be read.
    """
    kind = content_suffix(path)
    if kind == ".jsonl":
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                yield number, _parsed(line)
        return
    for number, row in enumerate(_parquet(path) if kind == ".parquet" else _json(path), start=1):
        yield number, row if isinstance(row, dict) else Refused("not an object")


def _parsed(line: bytes) -> Mapping[str, Any] | Refused:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter: a thousand brackets in each other
        return Refused("not JSON")
    return row if isinstance(row, dict) else Refused("not an object")


def _json(path: Path) -> list[Any]:
    try:
        content = json.loads(b"".join(read_lines(path)))
    except (ValueError, RecursionError) as error:
        raise MegalmError(
            f"{path} is not JSON ({error}): correct it, or name it .jsonl if each line is a row"
        ) from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise MegalmError(f"{path} is neither a list of rows nor an object whose `data` is one: rewrite it as a list")
    return [row for each in rows for row in _questions(each)]


def _questions(row: Any) -> list[Any]:
    """The questions of an article as SQuAD nests them, each with its context; any other row is one."""
    if not (isinstance(row, dict) and isinstance(row.get("paragraphs"), list)):
        return [row]
    try:
        return [
            {"context": paragraph["context"], **question}
            for paragraph in row["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError):
        return [row]


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MegalmError(f"{path} takes pyarrow to read: pip install pyarrow, or write the rows as JSONL") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise MegalmError(f"{path} cannot be read as Parquet ({error}): copy it again, or leave it out") from None


class Report:
    """How many rows there were, and where something befell one."""

    def __init__(self) -> None:
        self.rows = 0
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, what: str, place: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1
        places = self._places.setdefault(what, [])
        if len(places) < LINES_SHOWN:
            places.append(place)

    def __str__(self) -> str:
        """`2 of duplicate (line 5, line 9); 1 of an empty answer (line 7)`."""
        return "; ".join(
            f"{what}: {count:,} ({', '.join(self._places[what])}{', ...' if count > LINES_SHOWN else ''})"
            for what, count in sorted(self._counts.items())
        )


def read_examples(
    task: Task,
    path: str | Path,
    sequence_length: int,
    long_examples: Literal["refuse", "drop", "truncate"],
    at_most: int | None = None,
    variants: Callable[[Mapping[str, Any], int, int], Iterable[Mapping[str, Any]]] | None = None,
) -> ExampleSet:
    """The examples of a file or folder of rows, in order; its report says what was left out or cut, and where.

    at_most: look at so many rows only. variants: what a row stands for (sft.augment.Synonyms), given the number of its
    file and its line; itself if not given.

    Raises MegalmError for a file that cannot be read, if nothing is left, and for a long example that is refused.
    """
    files = row_files(path)
    report = Report()
    seen: set[bytes] = set()
    found: list[tuple[Example, int, int]] = []
    for number, file in enumerate(files):
        name = f"{file} " if len(files) > 1 else ""
        word = row_word(file)
        for line, row in read_rows(file):
            if at_most is not None and report.rows >= at_most:
                break
            report.rows += 1
            place = f"{name}{word} {line}"
            try:
                if isinstance(row, Refused):
                    raise row
                _require_new(row, seen)
                alike = variants(row, number, line) if variants else [row]
                examples = [example for each in alike for example in task.examples(each)]
            except Refused as refused:
                report.add(str(refused), place)
                continue
            except RecursionError:  # in a template
                report.add(_TOO_DEEP, place)
                continue
            except MegalmError as error:
                raise MegalmError(f"{file} {word} {line}: {error}") from None
            for example in examples:
                length = len(example.ids)
                if length > sequence_length:
                    if long_examples == "refuse":
                        raise MegalmError(
                            f"{file} {word} {line}: the example has {length:,} tokens and train.sequence_length is "
                            f"{sequence_length:,}: raise that, or set task.long_examples to drop or truncate"
                        )
                    if long_examples == "drop":
                        report.add(f"longer than {sequence_length:,} tokens", place)
                        continue
                    report.add(f"cut to {sequence_length:,} tokens", place)
                    example = example.cut(sequence_length)
                if example.weights.any():
                    found.append((example.compact(), number, line))
                else:
                    report.add("nothing in it is trained", place)
    if not found:
        raise MegalmError(
            f"none of the {report.rows:,} rows of {path} can be trained on ({str(report) or 'it is empty'}): correct "
            "them, task.kind, or the names in task.columns"
        )
    tokens, trained = (sum(int(count) for count in counts) for counts in zip(*map(_sizes, found)))
    told = f"{path}: {len(found):,} examples of {report.rows:,} rows, {trained:,} of {tokens:,} tokens trained"
    return ExampleSet.of(found, [str(file) for file in files], f"{told}; {report}" if str(report) else told)


def _sizes(found: tuple[Example, int, int]) -> tuple[int, int]:
    return len(found[0].ids), found[0].weights.astype(bool).sum()


def encoded(row: Mapping[str, Any]) -> bytes:
    """A row's content, the same in whatever order its columns stand. Raises Refused if it cannot be written."""
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True, default=str).encode()
    except UnicodeEncodeError:
        raise Refused("not Unicode (lone surrogates)") from None
    except RecursionError:
        raise Refused(_TOO_DEEP) from None


def _require_new(row: Mapping[str, Any], seen: set[bytes]) -> None:
    """Raise Refused for a row that is one of `seen`, to which it is added."""
    digest = hashlib.blake2b(encoded(row), digest_size=16).digest()
    if digest in seen:
        raise Refused("duplicate")
    seen.add(digest)
