"""Augmentation: what is drawn depends on the seed and the place alone, and touches training rows only."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megalm.data.examples import Example, ExampleSet, Rows
from megalm.data.order import uniform
from megalm.errors import MegalmError
from megalm.sft.augment import Synonyms, TokenDropout, open_augment, parse_synonyms, repeat_rare, repeats
from megalm.sft.config import TaskConfig
from megalm.sft.open import keep_examples
from megalm.sft.read import read_examples

TABLE = "# a comment\nbig\tlarge,huge\n\n北京\t首都\n京\t都城\nnew york\tNYC\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "synonyms.tsv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def synonyms(path: Path, share: float = 1.0, copies: int = 1, seed: int = 1) -> Synonyms:
    return Synonyms(path, ["text"], share, copies, seed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a big, bigger dog", ["a large, bigger dog", "a huge, bigger dog"]),
        ("Big dogs", ["Large dogs", "Huge dogs"]),
        ("he left New York", ["he left NYC"]),
        ("我爱北京的big房子", ["我爱首都的large房子", "我爱首都的huge房子"]),
        ("东京", ["东都城"]),
        ("nothing to do", ["nothing to do"]),
        ("", [""]),
    ],
)
def test_words_are_replaced_whole(table: Path, text: str, expected: list[str]) -> None:
    found = {synonyms(table).replace(text, random.Random(n)) for n in range(20)}
    assert found == set(expected)
    assert synonyms(table, share=1e-9).replace(text, random.Random(0)) == text


def test_copies_depend_on_the_seed_and_the_place(table: Path) -> None:
    row = {"text": "big " * 30, "label": "a big one"}

    def made(seed: int = 1, line: int = 1) -> list[Mapping[str, Any]]:
        return list(synonyms(table, 0.5, 2, seed)(row, 0, line))

    first, *copies = made()
    assert first is row and len(copies) == 2 and copies[0] != copies[1]
    assert all(copy["label"] == "a big one" and copy["text"] != row["text"] for copy in copies)
    assert 5 < copies[0]["text"].count("big") < 25, "about half of them"
    assert made() == [first, *copies] and made(seed=2)[1] != copies[0] != made(line=2)[1]
    assert list(synonyms(table)({"text": "nothing"}, 0, 1)) == [{"text": "nothing"}], "no copy that says the same"
    with pytest.raises(MegalmError, match="names text, and the row has no text there"):
        list(synonyms(table)({"txt": "big"}, 0, 1))


@pytest.mark.parametrize(
    ("content", "why"), [("big large\n", "line 1 is not a word, a tab"), ("# none\n", "no synonyms")]
)
def test_synonyms_that_are_none(content: str, why: str) -> None:
    with pytest.raises(MegalmError, match=why):
        parse_synonyms(content, Path("file"))


def test_the_share_of_ids_is_dropped_and_control_ids_stay() -> None:
    ids = np.tile(np.array([1, 5, 6, 7, 2], np.int32), 4000)
    dropped = TokenDropout(0.2, 0, {1, 2}, 7)(ids, 3, 0)
    changed = dropped != ids
    assert set(np.unique(dropped[changed])) == {0} and not changed[np.isin(ids, [1, 2])].any()
    assert changed.sum() / np.isin(ids, [5, 6, 7]).sum() == pytest.approx(0.2, abs=0.02)
    assert (TokenDropout(0.2, 0, {1, 2}, 7)(ids, 3, 0) == dropped).all()
    for other in (TokenDropout(0.2, 0, {1, 2}, 8)(ids, 3, 0), TokenDropout(0.2, 0, {1, 2}, 7)(ids, 4, 0)):
        assert ((other != ids) & changed).sum() / changed.sum() == pytest.approx(0.2, abs=0.05), "drawn anew"
    behind = TokenDropout(0.2, 0, {1, 2}, 7)(ids[500:], 3, 500)
    assert (behind == dropped[500:]).all(), "a place in a row is one place"


def test_uniform_numbers_are_uniform_and_fixed() -> None:
    numbers = uniform(np.arange(20000), "key", 1)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx([2000] * 10, rel=0.1)
    assert abs(np.corrcoef(numbers, uniform(np.arange(20000), "key", 2))[0, 1]) < 0.03
    assert numbers[:2].tolist() == uniform(np.arange(2), "key", 1).tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 1.0]))
def test_rare_classes_come_as_often_as_alpha_says(classes: list[int], alpha: float) -> None:
    of = np.array(classes)
    times = repeats(of, alpha)
    most = np.bincount(of).max()
    for each in np.unique(of):
        mine, count = times[of == each], (of == each).sum()
        assert mine.sum() == round(count**alpha * most ** (1 - alpha))
        assert mine.min() >= 1 and mine.max() - mine.min() <= 1, "spread evenly, and nothing is lost"


def classified(counts: dict[int, int]) -> ExampleSet:
    """Examples of three ids, the last of which has the class as its label."""
    examples = [
        (Example(np.array([1, 10 + c, 2]), np.array([0, 0, c]), np.array([0, 0, 1])), 0, n + 1)
        for n, c in enumerate(c for c, count in counts.items() for _ in range(count))
    ]
    return ExampleSet.of(examples, ["train.jsonl"], "read")


def test_repeated_examples_are_whole() -> None:
    before = classified({0: 8, 1: 2})
    after = repeat_rare(before, 0.0, ["体育", "财经"])
    assert len(after) == 16 and (after.lengths == 3).all()
    assert [int(after[n].ids[1]) for n in range(16)] == [10] * 8 + [11] * 8
    assert [after.origin(n)[1] for n in range(8, 16)] == [9] * 4 + [10] * 4
    assert after.report == "read; classes by task.augment.class_alpha 0: 体育 8 -> 8, 财经 2 -> 8"
    assert len({before.fingerprint, after.fingerprint, repeat_rare(before, 0.5).fingerprint}) == 3, "another corpus"
    assert len(repeat_rare(before, 1.0)) == 10


def test_rows_hand_their_examples_to_what_augments_them() -> None:
    def rows(augment: Callable[..., np.ndarray] | None) -> Rows:
        return Rows(
            [classified({0: 4})],
            [1.0],
            sequence_length=6,
            pad_id=0,
            arrangement="packed",
            global_batch_size=2,
            facts={},
            augment=augment,
        )

    asked: list[tuple[int, int]] = []

    def note(ids: np.ndarray, sample: int, start: int) -> np.ndarray:
        asked.append((sample, start))
        return ids + 100

    plain, changed = (rows(each).batch([(0, 0), None, (0, 1)], np.array([40, -1, 41])) for each in (None, note))
    assert asked == [(40, 0), (40, 3), (41, 0), (41, 3)], "places in rows of global numbers; padding is not asked"
    assert (changed.tokens[[0, 2]] == plain.tokens[[0, 2]] + 100).all() and (changed.tokens[1] == 0).all()
    assert (changed.labels == plain.labels).all() and (changed.loss_mask == plain.loss_mask).all()


class Words:
    """A task whose ids are its words' lengths."""

    facts: Mapping[str, Any] = {}

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        ids = np.array([len(word) for word in row["text"].split()])
        return [Example(ids, ids, np.ones(len(ids)))]


class Names:
    """A tokenizer's names."""

    fingerprint, bos_id, eos_id = "f", 1, 2

    def __init__(self, pad_id: int = 0, **names: int) -> None:
        self.pad_id, self.names, self.special_tokens = pad_id, names, {"<|im_start|>": 9}

    def token_to_id(self, name: str) -> int | None:
        return self.names.get(name)


def test_only_training_rows_get_copies(table: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a big dog", "a dog", "big", "a dog")))
    made = read_examples(Words(), rows, 10, "refuse", variants=synonyms(table))
    assert [made.origin(n)[1] for n in range(len(made))] == [1, 1, 2, 3, 3], "copies are from the line of their row"
    assert "duplicate: 1 (line 4)" in made.report

    def kept(folder: str, each: Synonyms | None) -> Path:
        return keep_examples(
            Words(), TaskConfig(), str(rows), Names(), 10, tmp_path / folder, each  # type: ignore[arg-type]
        )  # fmt: skip

    assert len(ExampleSet.load(kept("kept", synonyms(table)))) == 5 and len(ExampleSet.load(kept("kept", None))) == 3
    first = kept("kept", synonyms(table))
    table.write_text(TABLE + "dog\tpuppy\n")
    assert kept("kept", synonyms(table)) != first, "another file of synonyms makes other examples"


def test_what_stands_for_a_dropped_token() -> None:
    def opened(tokenizer: Names, **section: Any) -> TokenDropout:
        task = TaskConfig.model_validate({"augment": {"token_dropout": 0.5, **section}})
        dropout = open_augment(task, tokenizer, 1).dropout  # type: ignore[arg-type]
        assert dropout is not None
        return dropout

    ids = np.array([1, 2, 9] + [5] * 50)

    def seen(dropout: TokenDropout) -> set[int]:
        return set(dropout(ids, 0, 0).tolist())

    assert seen(opened(Names(**{"<unk>": 3}))) == {1, 2, 9, 5, 3}
    assert seen(opened(Names(**{"[UNK]": 4}))) == {1, 2, 9, 5, 4}
    assert seen(opened(Names())) == {1, 2, 9, 5, 0}
    assert seen(opened(Names(pad_id=2, mask=8), dropout_token="mask")) == {1, 2, 9, 5, 8}
    with pytest.raises(MegalmError, match="its padding is the end of a text"):
        opened(Names(pad_id=2))
    with pytest.raises(MegalmError, match="dropout_token mask is not in"):
        opened(Names(), dropout_token="mask")
    assert open_augment(TaskConfig(), Names(), 1).dropout is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"kind": "question_answering", "augment": {"synonyms": "x"}}, "would move what a row of question_answering"),
        ({"kind": "chat", "augment": {"class_alpha": 0.5}}, "the kind chat has not"),
        (
            {"kind": "text_classification", "multi_label": True, "augment": {"class_alpha": 0.5}},
            "several labels has not",
        ),
        ({"augment": {"token_dropout": 1.0}}, "less than 1"),
    ],
)
def test_mistakes_are_refused(section: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TaskConfig.model_validate(section)


def test_a_file_of_synonyms_that_is_not_there(tmp_path: Path) -> None:
    task = TaskConfig.model_validate({"kind": "text_classification", "augment": {"synonyms": str(tmp_path / "none")}})
    with pytest.raises(MegalmError, match="none cannot be read .*correct task.augment.synonyms"):
        open_augment(task, Names(), 1)  # type: ignore[arg-type]
