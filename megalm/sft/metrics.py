"""Scores: pure functions from references and predictions, row by row, to {name: value}. No torch.

Values are shares between 0 and 1, but those of bleu_chrf (0 to 100, as sacrebleu prints them) and perplexity. Chinese
is scored by characters; whether a corpus is Chinese is told by its references, or given.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from megalm.errors import MegalmError

Language = Literal["en", "zh"]

GREATER_IS_BETTER = {
    "loss": False,
    "bits_per_byte": False,
    "perplexity": False,
    **dict.fromkeys(
        [
            "accuracy",
            "subset_accuracy",
            "token_accuracy",
            "precision",
            "recall",
            "f1",
            "macro_f1",
            "micro_f1",
            "exact_match",
            "rouge1",
            "rouge2",
            "rougeL",
            "bleu",
            "chrf",
        ],
        True,
    ),
}
"""Of every score that megalm makes, whether more of it is better."""

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTER = re.compile(f"[{_CJK}]")
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
"""A Chinese character, or a word of another script."""


def language(texts: Iterable[str], share: float = 0.3) -> Language:
    """`zh` if more than `share` of the letters are Chinese characters, else `en`. A Chinese text that names things in
    English is still Chinese, since an English word takes more letters than a Chinese one."""
    chinese = letters = 0
    for text in texts:
        chinese += len(_CHARACTER.findall(text))
        letters += sum(map(str.isalpha, text))
    return "zh" if chinese > share * letters else "en"


# Classes


@dataclass(frozen=True)
class ClassScores:
    """support: rows whose reference is the class."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ClassDetails:
    """per_class: by label, in the order of the labels. confusion: rows by [reference][predicted]; None where a row has
    several labels."""

    per_class: dict[str, ClassScores]
    confusion: list[list[int]] | None = None


def classification(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """accuracy, macro_f1, micro_f1 of one label a row.

    The macro average is over the labels that appear in references or predictions: one that a small held-out set does
    not hold has no F1.
    """
    _paired(references, predictions)
    known = set(labels)
    assert known >= {*references, *predictions}, "a label that is not among the labels"
    accuracy = sum(map(str.__eq__, references, predictions)) / len(references)
    appearing = [label for label in labels if label in {*references, *predictions}]
    with _installed("classification scores", "scikit-learn"):
        from sklearn.metrics import f1_score

    macro, micro = (
        float(f1_score(references, predictions, labels=appearing, average=average, zero_division=0))
        for average in ("macro", "micro")
    )
    return {"accuracy": accuracy, "macro_f1": macro, "micro_f1": micro}


def class_details(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> ClassDetails:
    """Scores of every label, and who is taken for whom."""
    _paired(references, predictions)
    with _installed("classification scores", "scikit-learn"):
        from sklearn.metrics import confusion_matrix

    confusion = confusion_matrix(references, predictions, labels=list(labels)).tolist()
    return ClassDetails(_per_class(references, predictions, labels), confusion)


def multi_label(
    references: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, float]:
    """subset_accuracy (rows whose labels are exactly right), macro_f1 and micro_f1 of any number of labels a row. The
    macro average is over the labels that appear, as in classification()."""
    _paired(references, predictions)
    exact = sum(set(row) == set(predicted) for row, predicted in zip(references, predictions))
    appearing = {label for row in (*references, *predictions) for label in row}
    assert set(labels) >= appearing, "a label that is not among the labels"
    scores = multi_label_details(references, predictions, [label for label in labels if label in appearing])
    macro = [each.f1 for each in scores.per_class.values()]
    pairs = [[(label,) for label in row] for row in references], [[(label,) for label in row] for row in predictions]
    return {
        "subset_accuracy": exact / len(references),
        "macro_f1": sum(macro) / len(macro) if macro else 0.0,
        "micro_f1": relations(*pairs)["f1"],
    }


def multi_label_details(
    references: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str]
) -> ClassDetails:
    """Scores of every label where a row may have any number of them."""
    per_class = {}
    for label in labels:
        true, said = ([label in row for row in rows] for rows in (references, predictions))
        per_class[label] = _scores(sum(t and s for t, s in zip(true, said)), sum(said), sum(true))
    return ClassDetails(per_class)


def entities(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """precision, recall, f1 of whole entities, micro-averaged, and token_accuracy. Tags are IOB2 (B-PER, I-PER, O).

    An entity counts if its type and both its ends are right, as seqeval's strict mode has it: an I- that follows no B-
    of its type starts none.
    """
    _paired_tags(tags, predicted)
    with _installed("entity scores", "seqeval"):
        from seqeval.metrics.v1 import precision_recall_fscore_support  # v1 is its strict mode
        from seqeval.scheme import IOB2

    precision, recall, f1, _ = precision_recall_fscore_support(
        *_lists(tags, predicted), scheme=IOB2, average="micro", zero_division=0
    )
    tokens = sum(map(len, tags))
    right = sum(t == p for row, said in zip(tags, predicted) for t, p in zip(row, said))
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "token_accuracy": right / tokens if tokens else 0.0,
    }


def entity_details(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> ClassDetails:
    """Scores of every type of entity, as entities() counts them."""
    _paired_tags(tags, predicted)
    with _installed("entity scores", "seqeval"):
        from seqeval.metrics.v1 import precision_recall_fscore_support  # v1 is its strict mode
        from seqeval.scheme import IOB2

    types = sorted({tag[2:] for row in (*tags, *predicted) for tag in row if tag != "O"})
    if not types:
        return ClassDetails({})
    columns = precision_recall_fscore_support(*_lists(tags, predicted), scheme=IOB2, average=None, zero_division=0)
    # seqeval orders types by name, and knows only those of which there is a whole entity.
    whole = sorted({kind for row in (*tags, *predicted) for kind in _types(row)})
    found = {kind: ClassScores(float(p), float(r), float(f), int(n)) for kind, p, r, f, n in zip(whole, *columns)}
    return ClassDetails({kind: found.get(kind, ClassScores(0.0, 0.0, 0.0, 0)) for kind in types})


def relations(
    references: Sequence[Collection[Hashable]], predictions: Sequence[Collection[Hashable]]
) -> dict[str, float]:
    """precision, recall, f1 of what rows state, micro-averaged: each item of a row's collection is right or wrong.

    An item is a (subject, relation, object) triple, or the relation of a row that has one pair; a row without a
    relation is an empty collection, so that "no relation" is never counted as found (as TACRED's scorer has it).
    """
    _paired(references, predictions)
    rows = [(set(row), set(said)) for row, said in zip(references, predictions)]
    counted = _scores(sum(len(t & s) for t, s in rows), sum(len(s) for _, s in rows), sum(len(t) for t, _ in rows))
    return {"precision": counted.precision, "recall": counted.recall, "f1": counted.f1}


# Text


def span_answers(
    references: Sequence[Sequence[str]], predictions: Sequence[str], language: Language | None = None
) -> dict[str, float]:
    """exact_match and f1 of answers, each the best over a row's accepted answers (none: the question has no answer).

    English as SQuAD has it: case, punctuation and articles do not count, F1 is over bags of words. Chinese as CMRC 2018
    has it: a character is a unit, punctuation does not count, F1 is over the longest common stretch.
    """
    _paired(references, predictions)
    chinese = (language or _language_of(answer for row in references for answer in row)) == "zh"
    one = _cmrc if chinese else _squad
    best = [
        [max(values) for values in zip(*(one(answer, said) for answer in row or [""]))]
        for row, said in zip(references, predictions)
    ]
    exact, f1 = (sum(values) / len(values) for values in zip(*best))
    return {"exact_match": exact, "f1": f1}


def rouge(references: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2, rougeL: mean F-measures of rouge-score, without stemming.

    A Chinese character is a token. Of text in ASCII the tokens are rouge-score's own; words of other scripts, which it
    drops, count too.
    """
    _paired(references, predictions)
    with _installed("ROUGE", "rouge-score"):
        from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=_Tokenizer())
    rows = [scorer.score(reference, said) for reference, said in zip(references, predictions)]
    return {kind: sum(row[kind].fmeasure for row in rows) / len(rows) for kind in kinds}


def bleu_chrf(
    references: Sequence[str], predictions: Sequence[str], language: Language | None = None
) -> dict[str, float]:
    """bleu and chrf of the whole corpus, 0 to 100, by sacrebleu; Chinese with its tokenizer `zh`, else `13a`."""
    _paired(references, predictions)
    with _installed("BLEU and chrF", "sacrebleu"):
        import sacrebleu

    tokenizer = "zh" if (language or _language_of(references)) == "zh" else "13a"
    bleu = sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokenizer)
    chrf = sacrebleu.corpus_chrf(list(predictions), [list(references)])
    return {"bleu": float(bleu.score), "chrf": float(chrf.score)}


def perplexity(nats_per_token: float) -> dict[str, float]:
    """perplexity of a mean loss. It compares models of one tokenizer only; bits per byte compare any."""
    return {"perplexity": math.inf if nats_per_token >= 700 else math.exp(nats_per_token)}  # of NaN, NaN


# What the functions above share


def _paired(references: Sequence[Any], predictions: Sequence[Any]) -> None:
    assert len(references) == len(predictions), f"{len(references)} references, {len(predictions)} predictions"
    assert references, "nothing to score"


def _paired_tags(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    _paired(tags, predicted)
    for number, (row, said) in enumerate(zip(tags, predicted)):
        assert len(row) == len(said), f"row {number} has {len(row)} tags and {len(said)} predicted ones"
        for tag in (*row, *said):
            require_iob2(tag, f"row {number}")


def require_iob2(tag: str, place: str) -> None:
    """Raises MegalmError for another tag. place: where it stands."""
    if tag != "O" and tag[:2] not in ("B-", "I-"):
        names = "write B-TYPE where an entity starts, I-TYPE inside it and O outside"
        numbers = "name the tags that numbers stand for in task.labels"
        raise MegalmError(f"the tag {tag!r} of {place} is not IOB2: {numbers if tag.isdecimal() else names}")


def _lists(*rows: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """seqeval tells rows from tags by their being lists."""
    return [[list(tags) for tags in sequence] for sequence in rows]


def _types(tags: Sequence[str]) -> Iterator[str]:
    """Types of the whole entities of a row: each starts with its B-."""
    return (tag[2:] for tag in tags if tag.startswith("B-"))


def _per_class(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> dict[str, ClassScores]:
    right = Counter(reference for reference, said in zip(references, predictions) if reference == said)
    true, said = Counter(references), Counter(predictions)
    return {label: _scores(right[label], said[label], true[label]) for label in labels}


def _scores(right: int, said: int, true: int) -> ClassScores:
    """Of counts; 0 where there is nothing to divide by."""
    precision, recall = right / said if said else 0.0, right / true if true else 0.0
    return ClassScores(precision, recall, 2 * right / (said + true) if said + true else 0.0, true)


_language_of = language  # where a parameter has its name


class _Tokenizer:
    """For rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squad(answer: str, said: str) -> tuple[float, float]:
    """Exact match and F1, by the definitions of SQuAD's evaluate-v1.1.py, and of v2.0's where one side is empty."""
    true, words = (_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split() for text in (answer, said))
    if not true or not words:
        return float(true == words), float(true == words)
    common = sum((Counter(true) & Counter(words)).values())
    return float(true == words), 2 * common / (len(true) + len(words))


_CMRC_PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")
_CMRC_UNIT = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[.,'][^\W{_CJK}]+)*|[^\s\w]")
"""A Chinese character, a word or number of another script, or a mark that CMRC's list of punctuation leaves."""


def _cmrc(answer: str, said: str) -> tuple[float, float]:
    """Exact match and F1, by the definitions of cmrc2018_evaluate.py; its words of other scripts are nltk's, and these
    nearly so."""
    true, text = (each.lower().strip().translate(_CMRC_PUNCTUATION) for each in (answer, said))
    units, words = _CMRC_UNIT.findall(true), _CMRC_UNIT.findall(text)
    if not units or not words:
        return float(true == text), float(true == text)
    return float(true == text), 2 * _common_stretch(units, words) / (len(units) + len(words))


def _common_stretch(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest stretch that both hold."""
    longest, ending = 0, [0] * (len(second) + 1)  # ending[j]: of the one that ends before second[j]
    for unit in first:
        ending = [0, *(before + 1 if unit == other else 0 for before, other in zip(ending, second))]
        longest = max(longest, *ending)
    return longest


_NEEDED = {
    "accuracy": ("classification scores", "sklearn", "scikit-learn"),
    "token_accuracy": ("entity scores", "seqeval", "seqeval"),
    "rouge1": ("ROUGE", "rouge_score", "rouge-score"),
    "bleu": ("BLEU and chrF", "sacrebleu", "sacrebleu"),
}


def require_installed(scores: Iterable[str]) -> None:
    """Raises MegalmError if one of these scores needs a package that is not installed."""
    for what, module, package in (needed for score, needed in _NEEDED.items() if score in scores):
        with _installed(what, package):
            if find_spec(module) is None:
                raise ModuleNotFoundError(module)


@contextmanager
def _installed(what: str, package: str) -> Iterator[None]:
    """Around the import of an optional package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MegalmError(
            f"{what} need the package {package}, which is not installed: pip install 'megalm[sft]'"
        ) from error
