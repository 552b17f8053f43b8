"""Documents that hold questions or answers of an evaluation set are left out."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.curate.steps.units import CJK, grams, units
from megalm.errors import MegalmError


class DecontaminateSettings(Config):
    evaluations: list[str] = Field(min_length=1)
    """JSONL files of evaluation sets, one question a line. Every text in a line counts, each by itself, also within
    lists and objects."""
    fields: list[str] = []
    """If there are any, only these fields of a line count (`question`)."""
    words: int = Field(13, ge=5)
    """How many words in a row make an overlap (13: Brown et al. 2020, appendix C); of characters in Chinese and
    Japanese, of which a word has about 1.6, so many more."""
    min_words: int = Field(8, ge=4)
    """Texts of fewer than `words` count as a whole, if they have this many; shorter ones do not count, since they are
    anywhere."""
    allowed: int = Field(0, ge=0)
    """How many overlaps a document may have."""


class Decontaminate(ByDocument):
    """Case and punctuation do not count. A rejection names the file and line of the first overlap and shows it;
    metadata `overlaps` have the number of overlaps by file."""

    kind: ClassVar[str] = "decontaminate"
    Settings: ClassVar[type[Config]] = DecontaminateSettings
    settings: DecontaminateSettings

    @cached_property
    def _index(self) -> "_Index":
        return _Index.read(self.settings)

    def files(self) -> Sequence[str]:
        return self.settings.evaluations

    def prepare(self) -> None:
        self.report()

    def report(self) -> dict[str, dict[str, int]]:
        """By file, what is looked for: texts, those too short to count, and sequences of words."""
        return self._index.counted

    def verdict(self, document: Document) -> Rejection | None:
        lowered = document.text.lower()
        found = units(lowered)
        hits: list[tuple[int, int, int]] = []  # place, width, row of the index
        for width, hashes, _ in self._index.tables:
            if width > len(found):
                continue
            mine = grams(found.hashes, width)
            places = np.flatnonzero(self._index.maybe[mine >> _SHIFT])
            rows = np.minimum(np.searchsorted(hashes, mine[places]), len(hashes) - 1)
            same = hashes[rows] == mine[places]
            hits += [(place, width, row) for place, row in zip(places[same].tolist(), rows[same].tolist())]
        if not hits:
            return None
        owners = {width: owner for width, _, owner in self._index.tables}
        files: dict[str, int] = {}
        for _, width, row in hits:
            name = self.settings.evaluations[owners[width][row] >> 40]
            files[name] = files.get(name, 0) + 1
        document.metadata["overlaps"] = files
        if len(hits) <= self.settings.allowed:
            return None
        place, width, row = min(hits)
        file, line = divmod(int(owners[width][row]), 1 << 40)
        name = self.settings.evaluations[file]
        shared = " ".join(lowered[found.starts[place] : found.ends[place + width - 1]].split())
        return Rejection(f"in the evaluation set {Path(name).name}", f"line {line}, {len(hits)} overlaps: {shared}")


_BITS = 24
_SHIFT = np.uint64(64 - _BITS)


class _Index:
    """tables: for each width the sorted hashes, and of each the first file and line that has it, as file << 40 |
    line."""

    def __init__(
        self, tables: list[tuple[int, NDArray[np.uint64], NDArray[np.int64]]], counted: dict[str, Any]
    ) -> None:
        self.tables, self.counted = tables, counted
        # By the first bits of a hash whether it could be there: nearly all of a document's are not, and this is quicker
        # than to look each of them up.
        self.maybe = np.zeros(1 << _BITS, dtype=np.bool_)
        for _, hashes, _ in tables:
            self.maybe[hashes >> _SHIFT] = True

    @classmethod
    def read(cls, settings: DecontaminateSettings) -> "_Index":
        found: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        counted: dict[str, dict[str, int]] = {}
        for file, path in enumerate(settings.evaluations):
            told = counted[path] = {"texts": 0, "too short": 0, "sequences": 0}
            for line, text in _texts(path, settings.fields):
                found_units = units(text.lower())
                hashes = found_units.hashes
                told["texts"] += 1
                # Eight characters are the name of an institution, which many texts hold that know nothing of the set.
                scale = 1.6 if 2 * (found_units.classes == CJK).sum() > len(hashes) else 1.0
                if len(hashes) < round(scale * settings.min_words):
                    told["too short"] += 1
                    continue
                width = min(round(scale * settings.words), len(hashes))
                sequences = grams(hashes, width)
                told["sequences"] += len(sequences)
                found.setdefault(width, []).append((sequences, file << 40 | line))
            if told["texts"] == told["too short"]:
                raise MegalmError(
                    f"no text in {path} has {settings.min_words} words: check the step's fields, or lower min_words"
                )
        tables = []
        for width, pieces in sorted(found.items()):
            hashes = np.concatenate([piece for piece, _ in pieces])
            owners = np.repeat([owner for _, owner in pieces], [len(piece) for piece, _ in pieces])
            hashes, first = np.unique(hashes, return_index=True)
            tables.append((width, hashes, owners[first].astype(np.int64)))
        return cls(tables, counted)


def _texts(path: str, fields: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and texts."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if fields and isinstance(row, dict):
                    missing = [name for name in fields if name not in row]
                    if missing:
                        raise MegalmError(f"{path}:{number} has no field {missing[0]!r}: it has {', '.join(row)}")
                    row = [row[name] for name in fields]
                yield from ((number, text) for text in _strings(row))
    except (OSError, UnicodeDecodeError) as error:
        raise MegalmError(f"the evaluation set {path} cannot be read ({error}): name a JSONL file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise MegalmError(f"{path}:{number} is not JSON ({error}): an evaluation set has one object a line") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
