"""Exact duplicates: documents, paragraphs, lines and passages, against what sets and plain search find."""

import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalm.curate.document import Document
from megalm.curate.step import Merging
from megalm.curate.steps import records
from megalm.curate.steps.exact_documents import ExactDocuments, ExactDocumentsSettings
from megalm.curate.steps.exact_paragraphs import ExactParagraphs, ExactParagraphsSettings
from megalm.curate.steps.exact_substrings import ExactSubstrings, ExactSubstringsSettings
from megalm.curate.steps.records import Groups, Verdicts, id_hash
from megalm.errors import MegalmError
from tests.curate.small_steps import merged


def run(step: Merging, documents: list[Document], folder: Path, files: int = 2) -> tuple[list, dict]:
    """Verdicts of a whole run with several tasks and batches of three."""
    folder.mkdir(exist_ok=True)
    other, told = merged(step, documents, folder, files, 3)
    assert {path.name for path in (folder / "verdicts").iterdir()} == {Verdicts.IDS, Verdicts.ROWS}, "no scratch"
    return [
        answer for begin in range(0, len(documents), 3) for answer in other.apply(documents[begin : begin + 3])
    ], told


def documents(*texts: str) -> list[Document]:
    return [Document(f"id-{number}", text) for number, text in enumerate(texts)]


@pytest.mark.parametrize("memory_mb", [512, 0.0005])
def test_the_first_of_equal_documents_stays(memory_mb, tmp_path):
    draw = random.Random(0)
    texts = [f"text {draw.randrange(300)}" for _ in range(1000)]
    given = documents(*texts)
    answers, told = run(ExactDocuments(ExactDocumentsSettings(memory_mb=memory_mb)), given, tmp_path / "run", files=4)
    seen: set[str] = set()
    for text, document, answer in zip(texts, given, answers):
        assert (answer is not None) == (text in seen)
        if answer is None and texts.count(text) > 1:
            assert document.metadata["copies"] == texts.count(text)
        seen.add(text)
    assert told["removed"] == 1000 - len(seen)
    assert told["most copies of a text"] == max(map(texts.count, seen))


def test_space_and_case_count_unless_told(tmp_path):
    texts = "A  text.", "a text.\n", "another"
    for ignore, expected in ((False, [False, False, False]), (True, [False, True, False])):
        step = ExactDocuments(ExactDocumentsSettings(ignore_space_and_case=ignore))
        answers, _ = run(step, documents(*texts), tmp_path / str(ignore))
        assert [answer is not None for answer in answers] == expected


def test_no_documents_at_all(tmp_path):
    for step in (ExactDocuments(ExactDocumentsSettings()), ExactParagraphs(ExactParagraphsSettings()), substrings()):
        answers, told = run(step, [], tmp_path / step.kind, files=1)
        assert answers == [] and set(told.values()) <= {0}


def test_repeated_paragraphs_are_cut_from_later_documents_only(tmp_path):
    notice = "All rights reserved by the publisher of this page."
    texts = (
        f"First story, long enough to count.\n\n{notice}",
        f"{notice.upper()}\n\nSecond story, long enough too.\n\nYes.",
        f"Yes.\n\n{notice}\n \n{notice}",
        notice,
        "一个很长很长的段落，讲的是一件很久很久以前的事情。\n\n短。\n\n短。",
        "另一件事。\n\n一个很长很长的段落，讲的是一件很久很久以前的事情。",
    )
    given = documents(*texts)
    answers, told = run(ExactParagraphs(ExactParagraphsSettings()), given, tmp_path)
    assert [answer.reason if answer else None for answer in answers] == [
        None, None, None, "all paragraphs are in earlier documents", None, None,
    ]  # fmt: skip
    assert [document.text for document in given] == [
        texts[0], "Second story, long enough too.\n\nYes.", "Yes.", notice, texts[4], "另一件事。",
    ]  # fmt: skip
    assert told["cut"] == 5


def test_lines_keep_their_order_and_blank_lines(tmp_path):
    texts = "alpha alpha alpha alpha\nbeta\n\ngamma gamma gamma gamma", "delta\nalpha alpha alpha alpha\n\nepsilon"
    given = documents(*texts)
    run(ExactParagraphs(ExactParagraphsSettings(unit="line", min_characters=10)), given, tmp_path)
    assert [document.text for document in given] == [texts[0], "delta\n\nepsilon"]


def substrings(**settings: object) -> ExactSubstrings:
    return ExactSubstrings(ExactSubstringsSettings(**settings))


def test_planted_passages_are_cut_to_the_word(tmp_path):
    words = iter(f"w{number}" for number in range(10**6))

    def fresh(count: int) -> str:
        return " ".join(next(words) for _ in range(count))

    passage, short = fresh(60), fresh(49)
    texts = (
        f"{fresh(80)} {passage}. {fresh(30)}",
        f"{fresh(20)}\n{passage}!\n{fresh(20)} {short}",
        f"{short} {fresh(70)}",
        passage,
        f"{passage} {fresh(10)} {passage}",
    )
    given = documents(*texts)
    answers, told = run(substrings(), given, tmp_path)
    assert given[0].text == texts[0], "the first stays"
    assert given[1].text == texts[1].replace(f"{passage}!\n", "")
    assert given[2].text == texts[2], "49 words are too few"
    assert answers[3] is not None and answers[3].reason == "all passages are in earlier documents"
    assert given[4].text.split() == texts[4].split()[60:70]
    assert told["passages"] >= 4


def searched(texts: Sequence[str], length: int) -> list[str]:
    """What is left of texts whose characters are units, by a search through all windows."""
    seen: set[str] = set()
    left = []
    for text in texts:
        cut = set()
        for begin in range(len(text) - length + 1):
            window = text[begin : begin + length]
            if window in seen:
                cut |= set(range(begin, begin + length))
            seen.add(window)
        left.append("".join(character for place, character in enumerate(text) if place not in cut))
    return left


def copies(draw: random.Random) -> list[str]:
    """Texts of pieces of one long text, each between new characters."""
    pool = [chr(0x4E00 + draw.randrange(3000)) for _ in range(3000)]
    texts = []
    for _ in range(40):
        parts = []
        for _ in range(draw.randrange(1, 5)):
            begin = draw.randrange(len(pool) - 60)
            parts.append("".join(pool[begin : begin + draw.randrange(5, 60)]))
            parts.append("".join(chr(0x6000 + draw.randrange(8000)) for _ in range(draw.randrange(30))))
        texts.append("".join(parts))
    return texts


def common_sentence(draw: random.Random) -> list[str]:
    """One sentence in every text, with more of what was before it and after it in some."""
    sentence, variants = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳", ["天地玄黄", "宇宙洪荒", "日月盈昃"]
    return [
        f"{draw.choice(variants)[draw.randrange(4) :]}{sentence}{draw.choice(variants)[: draw.randrange(5)]}"
        + "".join(chr(0x6000 + draw.randrange(8000)) for _ in range(draw.randrange(8)))
        for _ in range(200)
    ]


def few_characters(draw: random.Random) -> list[str]:
    """Texts that repeat themselves, also in overlapping windows, and runs of one character."""
    return ["".join(draw.choices("一二", weights=(9, 1), k=draw.randrange(120))) for _ in range(60)] + ["一" * 300]


@pytest.mark.parametrize("memory_mb", [64, 0.001])
@pytest.mark.parametrize("texts", [copies, common_sentence, few_characters])
def test_every_long_passage_that_was_seen_before_is_cut_and_no_other(texts, memory_mb, tmp_path):
    for seed, length in ((1, 20), (2, 17), (3, 8)):
        drawn = texts(random.Random(seed))
        expected, given = searched(drawn, length), documents(*drawn)
        answers, told = run(substrings(length=length, memory_mb=memory_mb), given, tmp_path / str(seed))
        assert ["" if answer else document.text for document, answer in zip(given, answers)] == expected
        assert told["units repeated"] == len("".join(drawn)) - len("".join(expected)) > 0


def peak_megabytes(call: Callable[[], object]) -> float:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def test_a_sentence_in_very_many_documents_is_merged_in_bounded_memory(tmp_path):
    sentence = " ".join(f"w{number}" for number in range(50))
    step, given = substrings(memory_mb=0.25), [Document(f"{number}", sentence) for number in range(20_000)]
    sketch = step.sketch(given[:1])  # begins with the hash of the id
    (tmp_path / "sketch").write_bytes(b"".join(id_hash(each).to_bytes(8, "little") + sketch[8:] for each in given))
    (tmp_path / "verdicts").mkdir()
    peak = peak_megabytes(lambda: step.merge([tmp_path / "sketch"], tmp_path / "verdicts"))
    step.judge(tmp_path / "verdicts")
    answers = step.apply(given[:2] + given[-1:])
    assert [answer is None for answer in answers] == [True, False, False]
    assert peak < 4


def test_repeats_are_found_in_bounded_memory_whatever_one_key_has(tmp_path):
    """A million records, half of them of one key: the repeats, and the first of each key left out, in a megabyte."""
    draw = np.random.default_rng(0)
    records = np.zeros(1_000_000, dtype=[("key", "<u8"), ("place", "<u4")])
    records["key"] = draw.integers(0, 2**64, 600_000, dtype=np.uint64)[draw.integers(0, 600_000, len(records))]
    records["key"][::2] = 7
    records["place"] = np.arange(len(records))
    again = np.zeros(len(records), dtype=bool)

    def find() -> None:
        with Groups(tmp_path / "groups", records.dtype, "key", len(records), 2**20) as groups:
            for begin in range(0, len(records), 1000):
                groups.add(records[begin : begin + 1000])
            for found in groups.repeats():
                again[found["place"]] = True

    assert peak_megabytes(find) < 2
    _, first = np.unique(records["key"], return_index=True)
    assert np.array_equal(np.flatnonzero(~again), np.sort(first))


def test_a_sketch_that_is_cut_off_is_refused(tmp_path):
    for step in (ExactDocuments(ExactDocumentsSettings()), substrings(length=8)):
        sketch = tmp_path / "sketch"
        sketch.write_bytes(step.sketch(documents("one two three four five six seven eight nine"))[:-3])
        (tmp_path / step.kind).mkdir()
        with pytest.raises(MegalmError, match="cut off"):
            step.merge([sketch], tmp_path / step.kind)
        with pytest.raises(MegalmError, match="merge the sketches first"):
            step.judge(tmp_path / step.kind)


@pytest.mark.parametrize("expected", [0, 3000])
def test_groups_hold_their_bound_whatever_the_number_of_records(expected, tmp_path, monkeypatch):
    """More records than were expected, or than the most parts have room for, are cut again: what is in memory at once
    and how many files are open do not grow with them."""
    monkeypatch.setattr(records, "_MOST_PARTS", 4)
    dtype, memory = np.dtype([("key", "<u8"), ("place", "<u8")]), 4000
    draw = np.random.default_rng(0)
    most = {}
    for count in (300, 3000):
        given = np.empty(count, dtype)
        given["key"], given["place"] = draw.integers(0, 2**64, count, np.uint64), np.arange(count)
        given["key"][::2] = draw.choice(given["key"][::2], count // 2)  # equal ones
        with Groups(tmp_path / "scratch", dtype, "key", expected, memory) as groups:
            for begin in range(0, count, 100):
                groups.add(given[begin : begin + 100])
            opened, parts = [len(os.listdir("/proc/self/fd"))], []
            for part in groups.parts():
                assert part.nbytes * 4 <= memory
                parts.append(part)
                opened.append(len(os.listdir("/proc/self/fd")))
        assert not (tmp_path / "scratch").exists()
        assert np.array_equal(np.concatenate(parts), given[np.argsort(given["key"], kind="stable")])
        most[count] = max(opened) - opened[0]
    assert most[3000] <= most[300] <= 4


def test_records_of_one_key_stay_together(tmp_path, monkeypatch):
    """However many they are, and the others are cut from them."""
    monkeypatch.setattr(records, "_MOST_PARTS", 4)
    dtype = np.dtype([("key", "<u8"), ("place", "<u8")])
    given = np.empty(2000, dtype)
    given["key"], given["place"] = 2**63 + np.arange(2000, dtype=np.uint64) % 3 * 7, np.arange(2000)
    with Groups(tmp_path / "scratch", dtype, "key", 0, 4000) as groups:
        groups.add(given)
        parts = list(groups.parts())
    assert [{*part["key"].tolist()} for part in parts if len(part)] == [{2**63}, {2**63 + 7}, {2**63 + 14}]
    assert all((np.diff(part["place"].astype(np.int64)) > 0).all() for part in parts)


def test_verdicts_are_the_same_where_parts_are_cut_again(tmp_path, monkeypatch):
    draw = random.Random(3)
    texts = ["\n\n".join(f"paragraph number {draw.randrange(40)} of them all" for _ in range(4)) for _ in range(60)]
    kept = []
    for most, memory_mb in ((256, 512), (4, 0.0005)):
        monkeypatch.setattr(records, "_MOST_PARTS", most)
        for step in (
            ExactParagraphs(ExactParagraphsSettings(memory_mb=memory_mb)),
            substrings(length=8, memory_mb=memory_mb),
        ):
            given = documents(*texts)
            run(step, given, tmp_path / f"{most}-{step.kind}")
            kept.append([document.text for document in given])
    assert kept[:2] == kept[2:] and kept[0] != texts != kept[1]
