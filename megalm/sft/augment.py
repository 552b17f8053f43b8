"""More from the same rows: synonyms, rare classes more often, and ids that the model has to do without.

Each is a function of the seed and of where something stands, never of what was drawn before: neither the layout nor a
resumed run changes it. Only training rows are augmented. The places are three: a row before it becomes examples
(Synonyms), the examples of a source (repeat_rare), an example each time it is read (TokenDropout).
"""

import hashlib
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.examples import ExampleSet
from megalm.data.order import uniform
from megalm.errors import MegalmError
from megalm.sft.config import TaskConfig
from megalm.tokenizer.base import Tokenizer

UNKNOWN = ("<unk>", "[UNK]", "<|unk|>")
"""Names that tokenizers have for what they do not know."""


@dataclass(frozen=True)
class Augment:
    """What a run's task.augment asks for."""

    synonyms: "Synonyms | None"
    dropout: "TokenDropout | None"
    alpha: float


def open_augment(task: TaskConfig, tokenizer: Tokenizer, seed: int) -> Augment:
    """Raises MegalmError for synonyms that cannot be read, or ids that there is nothing to put in place of."""
    config = task.augment
    synonyms = None
    if config.synonyms is not None:
        synonyms = Synonyms(
            Path(config.synonyms), config.synonym_columns, config.synonym_share, config.synonym_copies, seed
        )
    dropout = None
    if config.token_dropout:
        replacement = _replacement(tokenizer, config.dropout_token)
        dropout = TokenDropout(config.token_dropout, replacement, _control_ids(tokenizer), seed)
    return Augment(synonyms, dropout, config.class_alpha)


class Synonyms:
    """Copies of a row in which some words say the same otherwise."""

    def __init__(self, path: Path, columns: Sequence[str], share: float, copies: int, seed: int) -> None:
        """columns: of a row, whose text may change. share: of the words that have synonyms. copies: beside the row."""
        content = _read(path)
        self._table = parse_synonyms(content, path)
        self._longest = max(map(len, self._table))
        self._columns, self._share, self._copies, self._seed = columns, share, copies, seed
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.facts = [digest, list(columns), share, copies, seed]
        """What fixes the copies of a row."""

    def __call__(self, row: Mapping[str, Any], file: int, line: int) -> Iterator[Mapping[str, Any]]:
        """The row, and its copies that differ from it. file, line: where it stands."""
        yield row
        for column in self._columns:
            if not isinstance(row.get(column), str):
                raise MegalmError(
                    f"task.augment.synonym_columns names {column}, and the row has no text there: name columns of texts"
                )
        for copy in range(self._copies):
            chance = random.Random(f"synonyms {self._seed} {file} {line} {copy}")
            changed = {column: self.replace(row[column], chance) for column in self._columns}
            if any(changed[column] != row[column] for column in self._columns):
                yield {**row, **changed}

    def replace(self, text: str, chance: random.Random) -> str:
        """A text with a share of its words replaced; of several that begin at one place, the longest counts."""
        pieces, place = [], 0
        while place < len(text):
            word = self._word_at(text, place)
            if word is None:
                pieces.append(text[place])
                place += 1
                continue
            choices = self._table[word] if word in self._table else self._table[word.lower()]
            if chance.random() < self._share:
                chosen = choices[int(chance.random() * len(choices))]
                pieces.append(chosen[0].upper() + chosen[1:] if word[0].isupper() else chosen)
            else:
                pieces.append(word)
            place += len(word)
        return "".join(pieces)

    def _word_at(self, text: str, place: int) -> str | None:
        if _inside(text, place):
            return None
        for stop in range(min(place + self._longest, len(text)), place, -1):
            word = text[place:stop]
            if (word in self._table or word.lower() in self._table) and not _inside(text, stop):
                return word
        return None


_LETTER = re.compile(r"[^\W\u3400-\u9fff]")


def _inside(text: str, place: int) -> bool:
    """Whether a place is within a word of letters; between Chinese characters it never is."""
    return 0 < place < len(text) and bool(_LETTER.match(text[place - 1]) and _LETTER.match(text[place]))


def parse_synonyms(content: str, path: Path) -> dict[str, list[str]]:
    """Word -> its synonyms, of lines WORD TAB SYNONYM[,SYNONYM ...]; empty lines and those that begin with # are left
    out. Raises MegalmError for another line, or if there is none."""
    table: dict[str, list[str]] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, tab, rest = line.partition("\t")
        synonyms = [each.strip() for each in re.split("[,，]", rest) if each.strip()]
        if not tab or not word.strip() or not synonyms:
            raise MegalmError(f"{path} line {number} is not a word, a tab and its synonyms: write WORD<tab>ONE,ANOTHER")
        table.setdefault(word.strip(), []).extend(synonyms)
    if not table:
        raise MegalmError(
            f"{path} holds no synonyms: write lines WORD<tab>ONE,ANOTHER, or leave out task.augment.synonyms"
        )
    return table


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise MegalmError(f"the synonyms {path} cannot be read ({why}): correct task.augment.synonyms") from error


class TokenDropout:
    """Some ids of an example are not what they were; its labels stay."""

    def __init__(self, share: float, replacement: int, kept: Collection[int], seed: int) -> None:
        """kept: ids that are never replaced: what a chat or a pair of texts is built of is not noise."""
        self._share, self._replacement, self._seed = share, replacement, seed
        self._kept = np.array(sorted(kept), np.int64)

    def __call__(self, ids: np.ndarray, sample: int, start: int) -> np.ndarray:
        """ids [n] of an example that begins at place `start` of sample number `sample`, of all that the run ever
        takes."""
        drawn = uniform(start + np.arange(len(ids)), "token dropout", self._seed, sample)
        return np.where((drawn < self._share) & ~np.isin(ids, self._kept), self._replacement, ids)


def _replacement(tokenizer: Tokenizer, name: str | None) -> int:
    for each in [name] if name else UNKNOWN:
        if (found := tokenizer.token_to_id(each)) is not None:
            return found
    if name:
        raise MegalmError(f"task.augment.dropout_token {name} is not in the tokenizer's vocabulary: name one that is")
    if tokenizer.pad_id == tokenizer.eos_id:
        raise MegalmError(
            "the tokenizer has no unknown token, and its padding is the end of a text: name what stands in place of "
            "dropped tokens in task.augment.dropout_token"
        )
    return tokenizer.pad_id


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    return {id for id in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_tokens.values()) if id is not None}


def repeats(classes: np.ndarray, alpha: float) -> np.ndarray:
    """How often each of some examples [n] is taken, int64 [n], so that a class of `count` examples is seen in
    proportion to count ** alpha: 1 takes each once, 0 all classes equally often. No class is taken less often than it
    comes; the copies of a class are spread evenly over its examples."""
    numbers, members, counts = np.unique(classes, return_inverse=True, return_counts=True)
    times = np.empty(len(classes), np.int64)
    for place in range(len(numbers)):
        mine = np.flatnonzero(members == place)
        total = round(len(mine) * (counts.max() / len(mine)) ** (1 - alpha))
        ends = np.arange(len(mine) + 1) * total // len(mine)
        times[mine] = np.diff(ends)
    return times


def repeat_rare(examples: ExampleSet, alpha: float, labels: Sequence[str] = ()) -> ExampleSet:
    """The examples of a classifier, those of rare classes several times (repeats()). labels: names of the classes."""
    trained = np.flatnonzero(examples.weights)
    of = np.searchsorted(examples.offsets, trained, side="right") - 1
    assert np.array_equal(of, np.arange(len(examples))), "an example has not one label"
    classes = np.asarray(examples.labels[trained])
    times = repeats(classes, alpha)
    taken = np.repeat(np.arange(len(examples)), times)
    lengths = examples.lengths[taken]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    places = np.arange(offsets[-1]) + np.repeat(examples.offsets[taken] - offsets[:-1], lengths)
    after = [
        f"{labels[number] if labels else number} {(classes == number).sum():,} -> {times[classes == number].sum():,}"
        for number in np.unique(classes)
    ]
    return ExampleSet(
        examples.ids[places],
        examples.labels[places],
        examples.weights[places],
        offsets,
        examples.origins[taken],
        examples.files,
        f"{examples.report}; classes by task.augment.class_alpha {alpha:g}: {', '.join(after)}",
        hashlib.sha256(f"{examples.fingerprint} repeated {alpha}".encode()).hexdigest(),
    )
