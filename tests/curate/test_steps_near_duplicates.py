"""Near-duplicates against exact Jaccard similarities, and planted edits of 1, 2 and 4 %."""

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megalm.curate.document import Document
from megalm.curate.recipe import build
from megalm.curate.steps.near_duplicates import NearDuplicates, NearDuplicatesSettings
from megalm.curate.steps.units import grams, units
from megalm.errors import MegalmError
from tests.curate.small_steps import merged

ENGLISH = [f"{a}{b}{c}" for a in ("ba", "ko", "li", "ter") for b in ("ma", "ni", "so", "ru", "pe") for c in "stnlrdgkm"]
CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 900)]


def step(**settings: object) -> NearDuplicates:
    return NearDuplicates(NearDuplicatesSettings(**settings))


def removed(step: NearDuplicates, documents: Sequence[Document], folder: Path, files: int = 3) -> tuple[set[str], dict]:
    """Ids that a whole run rejects, sketched in several tasks and small batches."""
    other, told = merged(step, documents, folder, files, 37)
    return {d.id for d, answer in zip(documents, other.apply(documents)) if answer}, told


def edited(words: list[str], share: float, vocabulary: list[str], draw: random.Random) -> list[str]:
    words = list(words)
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = draw.choice(vocabulary)
    return words


@pytest.mark.parametrize("vocabulary,joint", [(ENGLISH, " "), (CHINESE, "")], ids=["en", "zh"])
def test_planted_edits_are_found_as_often_as_theory_says(vocabulary, joint, tmp_path):
    draw = random.Random(3)
    documents, pairs = [], {0.01: [], 0.02: [], 0.04: []}
    for number in range(240):
        share = (0.01, 0.02, 0.04)[number % 3]
        words = draw.choices(vocabulary, k=300)
        documents.append(Document(f"{number}", joint.join(words) + "."))
        documents.append(Document(f"{number}b", joint.join(edited(words, share, vocabulary, draw))))
        pairs[share].append((documents[-2], documents[-1]))
    documents += [Document(f"alone{number}", joint.join(draw.choices(vocabulary, k=300))) for number in range(240)]
    gone, told = removed(step(), documents, tmp_path)

    assert not {name for name in gone if name.startswith("alone")}, "precision is 1"
    assert len({name.rstrip("b") for name in gone}) == len(gone) == told["removed"], "one of each pair stays"
    for share, planted in pairs.items():
        expected = np.mean([1 - (1 - jaccard(a.text, b.text) ** 8) ** 14 for a, b in planted])
        found = np.mean([a.id in gone or b.id in gone for a, b in planted])
        assert abs(found - expected) < 0.11, (share, found, expected)  # two deviations of 80 draws


def jaccard(first: str, second: str) -> float:
    """Exact, over 5-grams of words or characters, by other means than the step's."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        tokens = text.rstrip(".").split() if " " in text else list(text.rstrip("."))
        return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}

    one, other = shingles(first), shingles(second)
    return len(one & other) / len(one | other)


def test_signatures_estimate_jaccard_without_bias():
    draw = random.Random(0)
    words = draw.choices(ENGLISH, k=400)
    texts = [" ".join(edited(words, share / 100, ENGLISH, draw)) for share in range(0, 30, 2)]
    signatures = step(bands=32, rows=32).signatures(texts)
    errors = [
        float((signatures[i] == signatures[j]).mean()) - jaccard(texts[i], texts[j])
        for i, j in combinations(range(len(texts)), 2)
    ]
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.025  # at most sqrt(1/4/1024) = 0.016, were the hash functions independent


def test_case_and_punctuation_do_not_count_but_order_does():
    one, same, other = step().signatures(
        ["One two, three four five six!", "one TWO three - four five six", "six five four"]
    )
    assert (one == same).all()
    assert not (one == other).any()


def test_a_text_shorter_than_a_shingle_is_like_itself_and_nothing_is_like_nothing(tmp_path):
    texts = ["你好", "你好！", "好你", "", "...", "!!!", "two words"]
    gone, _ = removed(step(keep="first"), [Document(str(i), text) for i, text in enumerate(texts)], tmp_path, 1)
    assert gone == {"1"}


@pytest.mark.parametrize("keep,kept", [("longest", "long"), ("first", "plain"), ("score", "good")])
def test_the_best_of_a_cluster_stays(keep, kept, tmp_path):
    text = " ".join(ENGLISH)
    documents = [
        Document("plain", text),
        Document("good", text, {"score": 0.9}),
        Document("long", text + " !!!", {"score": 0.1}),
    ]
    gone, told = removed(step(keep=keep), documents, tmp_path)
    assert gone == {"plain", "good", "long"} - {kept}
    assert next(d for d in documents if d.id == kept).metadata["near_duplicates"] == 3
    assert told["clusters by size"] == {"3": 1}


def test_a_number_that_some_have_decides_and_one_that_none_has_is_refused(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    texts = [" ".join(ENGLISH)] * 3
    documents = [Document(str(i), text, {"score": score}) for i, (text, score) in enumerate(zip(texts, ("", None, -9)))]
    assert removed(step(keep="score"), documents, tmp_path / "a")[0] == {"0", "1"}
    with pytest.raises(MegalmError, match="no document has a number socre in its metadata: name one that they have"):
        removed(step(keep="socre"), documents, tmp_path / "b")
    assert removed(step(keep="socre"), [], tmp_path / "c")[0] == set()


@pytest.mark.parametrize("slip,meant", [("longset", "longest"), ("Longest", "longest"), ("fisrt", "first")])
def test_a_slip_in_keep_is_told_before_the_run(slip, meant):
    with pytest.raises(ValueError, match=f"steps.0.keep: {slip} is neither .* did you mean {meant}"):
        build([{"kind": "near_duplicates", "keep": slip}])


def test_little_memory_changes_nothing(tmp_path):
    """One part or five hundred: the same clusters."""
    draw = random.Random(1)
    documents = []
    for number in range(300):
        words = draw.choices(CHINESE, k=60)
        documents += [Document(f"{number}-{copy}", "".join(edited(words, 0.02, CHINESE, draw))) for copy in range(4)]
    results = []
    for name, each in (("ample", step()), ("small", step(memory_mb=0.001))):
        (tmp_path / name).mkdir()
        results.append(removed(each, documents, tmp_path / name))
        assert sorted(path.name for path in (tmp_path / name / "verdicts").iterdir()) == ["ids.bin", "rows.bin"]
    assert results[0] == results[1]


def test_shingles_are_of_units():
    assert len(grams(units("深度学习 deep learning").hashes, 5)) == 2
    assert len(grams(units("深度").hashes, 5)) == 1
    assert len(grams(units("").hashes, 5)) == 0
