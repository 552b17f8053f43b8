"""Scores against hand-computed values and the libraries' own defaults; each with a prediction that must score less."""

import builtins
import math
import subprocess
import sys
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from megalm.errors import MegalmError
from megalm.sft import metrics


def test_classes_by_hand() -> None:
    true = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "c", "c"]
    scores = metrics.classification(true, said, ["a", "b", "c", "never"])
    # F1: a 2*2/(3+2) = 0.8, b 2*1/(2+2) = 0.5, c 2*1/(1+2) = 2/3; `never` does not appear
    assert scores == pytest.approx({"accuracy": 4 / 6, "macro_f1": (0.8 + 0.5 + 2 / 3) / 3, "micro_f1": 4 / 6})
    details = metrics.class_details(true, said, ["a", "b", "c", "never"])
    assert details.per_class["a"] == metrics.ClassScores(1.0, pytest.approx(2 / 3), pytest.approx(0.8), 3)
    assert details.per_class["never"] == metrics.ClassScores(0.0, 0.0, 0.0, 0)
    assert details.confusion == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], "rows are what is true"
    assert set(metrics.classification(true, true, ["a", "b", "c"]).values()) == {1.0}
    with pytest.raises(AssertionError):
        metrics.classification(true, ["a"], ["a", "b", "c"])


def test_the_majority_class_alone_has_a_high_accuracy_and_a_low_macro_f1() -> None:
    scores = metrics.classification(["正面"] * 9 + ["负面"], ["正面"] * 10, ["负面", "正面"])
    assert scores["accuracy"] == 0.9 and scores["macro_f1"] == pytest.approx((18 / 19 + 0) / 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abc"))), min_size=1, max_size=8))
def test_several_labels_are_scored_as_sklearn_scores_them(rows: list[tuple[set[str], set[str]]]) -> None:
    true, said = zip(*rows)
    scores = metrics.multi_label(true, said, ["a", "b", "c"])
    table = [[[label in row for label in "abc"] for row in side] for side in (true, said)]
    assert scores["micro_f1"] == pytest.approx(f1_score(*table, average="micro", zero_division=0))
    appearing = [n for n in range(3) if any(row[n] for side in table for row in side)]
    macro = f1_score(*table, average="macro", labels=appearing, zero_division=0) if appearing else 0.0
    assert scores["macro_f1"] == pytest.approx(macro)
    assert scores["subset_accuracy"] == sum(a == b for a, b in rows) / len(rows)


def test_details_of_several_labels_have_no_confusion() -> None:
    details = metrics.multi_label_details([{"a", "b"}, {"a"}, set()], [{"a"}, {"b"}, set()], ["a", "b"])
    assert details.confusion is None
    assert details.per_class["a"] == metrics.ClassScores(1.0, 0.5, pytest.approx(2 / 3), 2)


def test_entities_count_whole() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"]]
    assert metrics.entities(true, true) == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "token_accuracy": 1.0}
    cut = [["B-PER", "O", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"]]
    # a person without its last token is no person: 2 of 3 said, 2 of 3 true
    assert metrics.entities(true, cut) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "token_accuracy": 6 / 7}
    )
    headless = [["I-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"]]
    assert metrics.entities(true, headless)["recall"] == pytest.approx(2 / 3), "strict: I- alone starts none"
    assert metrics.entities(true, headless)["precision"] == 1.0
    from seqeval.metrics import f1_score as lenient

    assert lenient(true, headless) == 1.0, "negative control: seqeval's default mode would let it pass"
    details = metrics.entity_details(true, [["I-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "I-ORG", "O"]])
    assert list(details.per_class) == ["LOC", "ORG", "PER"]
    assert details.per_class["LOC"] == metrics.ClassScores(1.0, 1.0, 1.0, 1)
    assert details.per_class["ORG"] == details.per_class["PER"] == metrics.ClassScores(0.0, 0.0, 0.0, 1)


def test_entities_where_there_are_none() -> None:
    assert metrics.entities([["O", "O"]], [["O", "O"]])["f1"] == 0.0
    assert metrics.entity_details([["O"]], [["O"]]).per_class == {}
    with pytest.raises(MegalmError, match="the tag 'E-PER' of row 1 is not IOB2"):
        metrics.entities([["O"], ["O"]], [["O"], ["E-PER"]])


def test_relations_count_only_what_is_stated() -> None:
    true = [{"founder"}, set(), {"spouse"}, {"founder"}]
    said = [{"founder"}, {"spouse"}, {"founder"}, set()]
    assert metrics.relations(true, said) == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    nothing = [set()] * 4
    assert metrics.relations(true, nothing)["f1"] == 0.0, "a row that is rightly empty is no success"
    triples = [{("鲁迅", "出生地", "绍兴"), ("鲁迅", "职业", "作家")}]
    turned = [{("绍兴", "出生地", "鲁迅"), ("鲁迅", "职业", "作家")}]
    assert metrics.relations(triples, triples)["f1"] == 1.0 and metrics.relations(triples, turned)["f1"] == 0.5


@pytest.mark.parametrize(
    ("accepted", "said", "exact", "f1"),
    [
        (["the Normans"], "Normans!", 1, 1),
        (["Denver Broncos", "The Denver Broncos of 2015"], "Broncos of 2015", 0, 6 / 7),  # 3 of 3, 3 of 4
        (["in the 10th century"], "10th and 11th century", 0, 2 * 2 / (3 + 4)),
        (["a b b"], "b b b", 0, 2 * 2 / (2 + 3)),  # a bag of words, and `a` is an article
        (["Paris"], "London", 0, 0),
        ([], "", 1, 1),
        ([], "Paris", 0, 0),
    ],
)
def test_english_answers(accepted: list[str], said: str, exact: float, f1: float) -> None:
    assert metrics.span_answers([accepted], [said], "en") == pytest.approx({"exact_match": exact, "f1": f1})


@pytest.mark.parametrize(
    ("accepted", "said", "exact", "f1"),
    [
        (["《范廷颂》"], "范廷颂", 1, 1),
        (["1963年"], "1963年6月", 0, 2 * 2 / (2 + 4)),  # 1963 and 6 are one unit each
        (["是北京大学"], "北京的大学", 0, 2 * 2 / 10),  # the longest common stretch, where a bag would have 4
        (["上海", "上海市浦东新区"], "浦东新区", 0, 2 * 4 / (7 + 4)),
        (["上海"], "北京", 0, 0),
        (["开源DB 引擎"], "开源db引擎", 0, 1),  # the blank is in the exact form, as in the official script
    ],
)
def test_chinese_answers(accepted: list[str], said: str, exact: float, f1: float) -> None:
    scores = metrics.span_answers([accepted], [said])
    assert scores == pytest.approx({"exact_match": exact, "f1": f1})
    if 0 < f1 < 1:
        assert metrics.span_answers([accepted], [said], "en")["f1"] != pytest.approx(f1), "the language is told"


def test_rouge_is_rouge_scores_own_on_english() -> None:
    true, said = "The cat, it sat on the mat's edge.", "the cat sat at the edge"
    ours, theirs = metrics.rouge([true], [said]), RougeScorer(["rouge1", "rouge2", "rougeL"]).score(true, said)
    assert ours == {kind: score.fmeasure for kind, score in theirs.items()} and 0 < ours["rouge2"] < 1


def test_rouge_of_chinese_is_by_characters() -> None:
    true, said = "今天天气很好", "今天气很好"
    scores = metrics.rouge([true, true], [said, true])
    # characters: 5 of 6 and 5 of 5; pairs: 今天 天气 气很 很好, 4 of 5 and 4 of 4; the subsequence: 5
    assert scores == pytest.approx(
        {"rouge1": (10 / 11 + 1) / 2, "rouge2": (8 / 9 + 1) / 2, "rougeL": (10 / 11 + 1) / 2}
    )
    assert metrics.rouge([true], ["你们"])["rouge1"] == 0.0
    assert RougeScorer(["rouge1"]).score(true, true)["rouge1"].fmeasure == 0.0, "negative control: its own drops all"
    assert metrics.rouge(["Привет мир"], ["привет"])["rouge1"] == pytest.approx(2 / 3)


def test_bleu_and_chrf_are_sacrebleus() -> None:
    true = ["The quick brown fox jumps over the dog.", "It is here."]
    said = ["A quick brown fox jumps over the dog.", "It is there."]
    scores = metrics.bleu_chrf(true, said)
    assert scores["bleu"] == sacrebleu.corpus_bleu(said, [true]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(said, [true]).score
    assert metrics.bleu_chrf(true, true) == pytest.approx({"bleu": 100, "chrf": 100})


def test_bleu_of_chinese_cuts_it_into_characters() -> None:
    true, said = ["我们今天去北京大学参观"], ["我们今天去北京参观"]
    bleu = metrics.bleu_chrf(true, said)["bleu"]
    # n-grams of 9 characters said: 9/9, 7/8, 5/7, 4/6 of them are true; brevity exp(1 - 11/9)
    assert bleu == pytest.approx(100 * (1 * 7 / 8 * 5 / 7 * 4 / 6) ** 0.25 * math.exp(1 - 11 / 9))
    assert metrics.bleu_chrf(true, said, "en")["bleu"] == 0.0, "negative control: as one English word it is wrong"


def test_perplexity() -> None:
    assert metrics.perplexity(math.log(50)) == pytest.approx({"perplexity": 50})
    assert metrics.perplexity(1e6) == {"perplexity": math.inf}


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["Hello world"], "en"),
        (["他用 PyTorch 训练模型"], "zh"),
        (["The Chinese word 北京 means northern capital"], "en"),
        ([], "en"),
        (["12, 34"], "en"),
    ],
)
def test_languages(texts: list[str], language: str) -> None:
    assert metrics.language(texts) == language


def test_every_score_says_whether_more_is_better() -> None:
    made = [
        metrics.classification(["a"], ["a"], ["a"]),
        metrics.multi_label([["a"]], [["a"]], ["a"]),
        metrics.entities([["O"]], [["O"]]),
        metrics.relations([["a"]], [["a"]]),
        metrics.span_answers([["a"]], ["a"]),
        metrics.rouge(["a"], ["a"]),
        metrics.bleu_chrf(["a"], ["a"]),
        metrics.perplexity(1.0),
    ]
    assert set().union(*made) <= set(metrics.GREATER_IS_BETTER)
    assert [name for name, greater in metrics.GREATER_IS_BETTER.items() if not greater] == [
        "loss",
        "bits_per_byte",
        "perplexity",
    ]


@pytest.mark.parametrize(
    ("package", "score"),
    [
        ("scikit-learn", lambda: metrics.classification(["a"], ["a"], ["a"])),
        ("seqeval", lambda: metrics.entities([["O"]], [["O"]])),
        ("rouge-score", lambda: metrics.rouge(["a"], ["a"])),
        ("sacrebleu", lambda: metrics.bleu_chrf(["a"], ["a"])),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, score: Any) -> None:
    module = {"scikit-learn": "sklearn", "rouge-score": "rouge_score"}.get(package, package)
    right = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(name)
        return right(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MegalmError, match=rf"need the package {package}, .*pip install 'megalm\[sft\]'"):
        score()


def test_scores_need_no_torch_and_load_libraries_only_when_asked() -> None:
    script = (
        "import sys, megalm.sft.metrics as m\n"
        "assert not {'sklearn', 'seqeval', 'sacrebleu', 'numpy'} & set(sys.modules)\n"
        "m.span_answers([['a']], ['a']); m.entities([['O']], [['O']])\n"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_what_is_not_installed_is_said_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.require_installed(["loss", "accuracy", "token_accuracy", "rouge1", "bleu"])
    monkeypatch.setattr(metrics, "find_spec", lambda module: None if module == "sacrebleu" else module)
    metrics.require_installed(["loss", "rouge1"])
    with pytest.raises(MegalmError, match="BLEU and chrF need the package sacrebleu"):
        metrics.require_installed(["perplexity", "bleu"])


def test_the_perplexity_of_no_number_is_none() -> None:
    assert (
        math.isnan(metrics.perplexity(math.nan)["perplexity"]) and metrics.perplexity(800.0)["perplexity"] == math.inf
    )
