"""The n-gram model beside lmplz's numbers, nltk's, and its own sums; the step and the tool that use it."""

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megalm.curate.document import Document
from megalm.curate.plan import prepare
from megalm.curate.recipe import build, step_class
from megalm.curate.steps.kneser_ney import KneserNey
from megalm.errors import MegalmError
from megalm.tokenizer.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
LMPLZ = Path(__file__).parent / "lmplz"


def lines(count: int = 150, words: int = 400) -> list[list[int]]:
    """Lines in which words follow some words more often than others; the same in every Python."""
    state, found = 1, []
    for _ in range(count):
        line: list[int] = []
        while True:
            state = (state * 1103515245 + 12345) % 2**31
            draw = state / 2**31
            if draw < 0.12:
                break
            line.append(int(words * draw**6) + (line[-1] % 3 if line else 0))
        found.append(line)
    return found


def read(path: Path) -> dict[str, tuple[float, float]]:
    """n-gram -> log10 of its probability and of its back-off weight."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if "\t" in line]
    return {row[1]: (float(row[0]), float(row[2]) if len(row) > 2 else 0.0) for row in rows}


@pytest.mark.parametrize("name,order,prune", [("whole", 3, (0,)), ("pruned", 3, (0, 1, 2))])
def test_the_numbers_are_those_of_lmplz(name, order, prune, tmp_path):
    """tests/curate/lmplz: what `lmplz -o 3 (--prune 0 1 2)` of kenlm 0.3.0 wrote for these lines."""
    KneserNey(lines(), order, prune).write(tmp_path / "ours.arpa")
    ours, theirs = read(tmp_path / "ours.arpa"), read(LMPLZ / f"{name}.arpa")
    ours["<s>"] = (theirs["<s>"][0], ours["<s>"][1])  # a probability that nobody asks for
    assert ours.keys() == theirs.keys()
    for ngram, numbers in theirs.items():
        assert ours[ngram] == pytest.approx(numbers, abs=2e-5), ngram
    KneserNey(lines(), order, prune, [(0.5, 1.0, 1.5)] * order).write(tmp_path / "wrong.arpa")
    wrong = read(tmp_path / "wrong.arpa")
    assert any(abs(wrong[ngram][0] - numbers[0]) > 0.01 for ngram, numbers in theirs.items() if ngram != "<s>")


def test_the_numbers_are_those_of_nltk(tmp_path):
    """With one discount, none of it for single words; contexts with the begin of a line, nltk does otherwise."""
    models = pytest.importorskip("nltk.lm")
    from nltk.util import everygrams

    discount = 0.6
    text = lines(80, 20)
    theirs = models.KneserNeyInterpolated(3, discount=discount)
    padded = [["<s>", *map(str, line), "</s>"] for line in text]
    theirs.fit((list(everygrams(line, max_len=3)) for line in padded), vocabulary_text=itertools.chain(*padded))
    KneserNey(text, 3, discounts=[(0, 0, 0), *[(discount,) * 3] * 2]).write(tmp_path / "ours.arpa")
    ours = read(tmp_path / "ours.arpa")
    compared = 0
    for ngram, (probability, _) in ours.items():
        *context, word = ngram.split()
        if not {"<s>", "<unk>"} & {word, *context}:
            assert 10**probability == pytest.approx(theirs.score(word, context or None), rel=1e-5), ngram
            compared += 1
    assert compared > 300


@pytest.mark.parametrize("prune", [(0,), (0, 1, 2)])
def test_probabilities_add_up_to_one(prune, tmp_path):
    kenlm = pytest.importorskip("kenlm")
    text = lines()
    KneserNey(text, 4, prune).write(tmp_path / "model.arpa")
    model = kenlm.Model(str(tmp_path / "model.arpa"))
    vocabulary = [*{str(word) for line in text for word in line}, "</s>", "<unk>"]
    for context in ([], *(line[:length] for line in text[:40] for length in (1, 3))):
        state, after = kenlm.State(), kenlm.State()
        model.BeginSentenceWrite(state)
        for word in context:
            model.BaseScore(state, str(word), after)
            state, after = after, state
        total = sum(10 ** model.BaseScore(state, word, kenlm.State()) for word in vocabulary)
        assert total == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(MegalmError, match="no text"):
        KneserNey([], 3)
    with pytest.raises(MegalmError, match="ascending"):
        KneserNey(lines(), 3, (0, 2, 1))


def tool(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tools/train_perplexity_model.py", *map(str, arguments)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_good_text_surprises_less_than_noise(perplexity_model, tmp_path):
    model = Path(shutil.copytree(perplexity_model / "model", tmp_path / "model"))
    rows = [json.loads(line)["text"] for line in (perplexity_model / "good.jsonl").open()]
    aside = rows[19::20]  # what the tool keeps aside
    draw = random.Random(0)
    noise = [" ".join(draw.sample(text.split(), len(text.split()))) for text in aside]
    Perplexity = step_class("perplexity")

    def judge(texts: list[str], **settings: object) -> tuple[list[Document], list[str | None]]:
        step = Perplexity(Perplexity.Settings.model_validate({"models": {"en": {"path": str(model), **settings}}}))
        documents = [Document(str(number), text, {"language": "en"}) for number, text in enumerate(texts)]
        return documents, [verdict.reason if verdict else None for verdict in step.apply(documents)]

    good, _ = judge(aside)
    bad, _ = judge(noise)
    values = [document.metadata["perplexity"] for document in good]
    assert sum(a < b.metadata["perplexity"] for a, b in zip(values, bad)) > 0.97 * len(good)
    middle = sorted(values)[len(values) // 2] + 0.05  # they are rounded
    documents, reasons = judge(aside, buckets=[middle, 1e6], reject_above=middle)
    assert {document.metadata["perplexity_bucket"] for document in documents} == {0, 1}
    for value, document, reason in zip(values, documents, reasons):
        assert document.metadata["perplexity_bucket"] == (value >= middle)
        assert reason == ("perplexity too high" if value > middle else None)
    _, reasons = judge(["the the the the"], reject_below=1e9)
    assert reasons == ["perplexity too low"]

    step = Perplexity(Perplexity.Settings.model_validate({"models": {"zh": {"path": str(model)}}}))
    assert {Path(file).name for file in step.files()} > {"model.arpa"}
    with pytest.raises(MegalmError, match="put the step language before it"):
        step.apply([Document("1", "a text")])
    other = Document("1", "a text", {"language": "en"})
    assert step.apply([other]) == [None] and "perplexity" not in other.metadata
    (model / "model.arpa").write_text("not a model")
    with pytest.raises(MegalmError, match="cannot be read"):
        judge(aside)
    (model / "model.arpa").unlink()
    with pytest.raises(MegalmError, match="no perplexity model"):
        judge(aside)


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ({}, "at least 1 item"),
        ({"english": {"path": "x"}}, "match pattern"),
        ({"en": {"path": "x", "buckets": [30, 5]}}, "not ascending"),
        ({"en": {"path": "x", "reject_above": 5, "reject_below": 6}}, "rejects everything"),
    ],
)
def test_settings_that_make_no_sense_are_refused(models, told):
    pytest.importorskip("kenlm")
    with pytest.raises(ValueError, match=told):
        build([{"kind": "perplexity", "models": models}])


def test_another_model_in_a_run_that_goes_on_is_refused(perplexity_model, make_recipe, tmp_path):
    model = Path(shutil.copytree(perplexity_model / "model", tmp_path / "model"))
    models = {"en": {"path": str(model)}, "zh": {"path": str(model)}}
    recipe = make_recipe(steps=[{"kind": "language"}, {"kind": "perplexity", "models": models}])
    prepare(recipe)
    shutil.copy(model / "model.arpa", model / "model.bin")  # which would be taken from now on
    with pytest.raises(MegalmError, match=r"model\.(arpa|bin), which decides"):
        prepare(recipe)


def test_a_missing_kenlm_is_told_with_the_recipe(monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ValueError, match=r"steps.0 \(perplexity\).*pip install 'megalm\[perplexity\]'"):
        build([{"kind": "perplexity", "models": {"en": {"path": "x"}}}])


def test_the_tool_refuses_with_a_sentence(tmp_path):
    train(lambda: list(topics.values())[:40], 600, sample_bytes=200_000).save(tmp_path / "tokenizer")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "good.jsonl").write_text('{"text": "some words and some more"}\n')
    given = ["--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "model", "--corpus"]
    for arguments, told in (
        ([*given, tmp_path / "none.jsonl"], "none.jsonl"),
        ([*given, tmp_path / "empty.jsonl"], "no text"),
        ([*given, tmp_path / "empty.jsonl", "--order", "9"], "order 2 to 6"),
        ([*given, tmp_path / "empty.jsonl", "--prune", "-1"], "at least 0"),
        ([*given, tmp_path / "empty.jsonl", "--most-tokens", "0"], "at least 1"),
        ([*given, tmp_path / "good.jsonl", "--text-field", "txt"], "without a text field 'txt'"),
        ([*given, tmp_path / "good.jsonl", "--output", tmp_path], "is there already"),
        ([*given, tmp_path / "good.jsonl", "--output", tmp_path / "good.jsonl" / "model"], "cannot write"),
    ):
        done = tool(*arguments)
        assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr
