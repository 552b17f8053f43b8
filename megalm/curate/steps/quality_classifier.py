"""A trained classifier's opinion of a document: fastText's bag of hashed words and pairs of words, as logistic
regression.

What data such a classifier is trained on decides what stays: references of encyclopaedias (GPT-3, LLaMA), instructions
and explanations (DCLM, section 4.4, found these best). tools/train_quality_classifier.py trains one from two JSONL
files.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Step
from megalm.curate.steps.units import Hashes, grams, units
from megalm.errors import MegalmError

VERSION = 1


class QualityClassifierSettings(Config):
    model: str
    """A file that tools/train_quality_classifier.py wrote."""
    action: Literal["reject", "score"] = "reject"
    """reject: leave out what scores below `threshold`. score: only write the score, and its bucket, into metadata."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Of the probability that the document is like the positive examples."""
    buckets: list[float] = [0.2, 0.4, 0.6, 0.8]
    """Scores at which one bucket ends and the next begins, ascending: metadata `<name>_bucket` is 0 below the first."""
    name: str = "quality"
    """Metadata get `<name>_score` and `<name>_bucket`."""


class QualityClassifier(Step):
    kind: ClassVar[str] = "quality_classifier"
    Settings: ClassVar[type[Config]] = QualityClassifierSettings
    settings: QualityClassifierSettings

    @cached_property
    def _model(self) -> "HashedNgrams":
        return HashedNgrams.load(self.settings.model)

    def files(self) -> Sequence[str]:
        return [self.settings.model]

    def prepare(self) -> None:
        self._model.scores(["Some words to begin with."])

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        answers: list[Rejection | None] = []
        settings = self.settings
        for document, score in zip(documents, self._model.scores([document.text for document in documents])):
            document.metadata[f"{settings.name}_score"] = round(score, 4)
            document.metadata[f"{settings.name}_bucket"] = sum(score >= bound for bound in settings.buckets)
            low = settings.action == "reject" and score < settings.threshold
            answers.append(Rejection(f"{settings.name} score too low", f"{score:.3f}") if low else None)
        return answers

    def measure(self, document: Document) -> dict[str, float]:
        score = document.metadata.get(f"{self.settings.name}_score")
        return {f"{self.settings.name} score": float(score)} if isinstance(score, int | float) else {}


class HashedNgrams:
    """Logistic regression over which hashed n-grams a text holds and how often (Joulin et al. 2016, whose embedding has
    one dimension here). A text's features are its n-grams' shares, so that its length does not count."""

    def __init__(self, weights: NDArray[np.float32], bias: float, longest: int, max_units: int) -> None:
        self.weights, self.bias, self.longest, self.max_units = weights, bias, longest, max_units
        assert len(weights) & (len(weights) - 1) == 0, "a power of two"

    def features(self, text: str) -> NDArray[np.int64]:
        """Places in the table, one for each n-gram."""
        hashes = units(text.lower()).hashes[: self.max_units]
        pieces: list[Hashes] = [grams(hashes, n) for n in range(1, self.longest + 1) if n <= len(hashes)]
        found = np.concatenate(pieces) if pieces else hashes
        return (found >> np.uint64(64 - (len(self.weights).bit_length() - 1))).astype(np.int64)

    def scores(self, texts: Sequence[str]) -> list[float]:
        """Probabilities of being like the positive examples; of a text without words that of the bias."""
        sums = [float(self.weights[places].mean()) if len(places) else 0.0 for places in map(self.features, texts)]
        return [_probability(total + self.bias) for total in sums]

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(
                    file, weights=self.weights.astype(np.float16), bias=np.float64(self.bias),
                    longest=self.longest, max_units=self.max_units, version=VERSION,
                )  # fmt: skip
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "HashedNgrams":
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["version"]) != VERSION:
                    raise MegalmError(f"the classifier {path} is of version {int(file['version'])}: train it again")
                weights = file["weights"].astype(np.float32)
                return cls(weights, float(file["bias"]), int(file["longest"]), int(file["max_units"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise MegalmError(
                f"the classifier {path} cannot be read ({error}): name a file of tools/train_quality_classifier.py"
            ) from None


def _probability(logit: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(logit, -500, 500))))


def train(
    positive: Iterable[str], negative: Iterable[str], *, bits: int = 20, longest: int = 2, max_units: int = 1000,
    passes: int = 5, rate: float = 1.0, held_out: float = 0.1, seed: int = 0,
) -> tuple[HashedNgrams, dict[str, float]]:  # fmt: skip
    """A model, and what it scores on a held-out share of the texts. Both classes weigh the same, however many texts
    they have. Adagrad, one text at a time: each feature has its own rate, since words are rare and often alike."""
    model = HashedNgrams(np.zeros(1 << bits, dtype=np.float32), 0.0, longest, max_units)
    rows = [(model.features(text), label) for label, texts in ((1, positive), (0, negative)) for text in texts]
    rows = [(places, label) for places, label in rows if len(places)]
    random = np.random.Generator(np.random.PCG64(seed))
    order = random.permutation(len(rows))
    kept_aside = max(2, round(held_out * len(rows)))
    aside, inside = order[:kept_aside], order[kept_aside:]
    counts = np.bincount([rows[i][1] for i in inside], minlength=2)
    if counts.min() == 0:
        raise MegalmError(f"{counts[1]} positive and {counts[0]} negative texts to train on: give some of both")
    weights = len(inside) / (2 * counts)
    squares = np.full(1 << bits, 1e-8, dtype=np.float32)
    for _ in range(passes):
        for i in random.permutation(inside):
            places, label = rows[i]
            _learn(model, squares, places, label, rate, float(weights[label]))
    return model, _measured(model, [rows[i] for i in aside])


def _learn(
    model: HashedNgrams, squares: NDArray[np.float32], places: NDArray[np.int64], label: int, rate: float, weight: float
) -> None:
    unique, times = np.unique(places, return_counts=True)
    shares = (times / len(places)).astype(np.float32)
    error = (_probability(float(model.weights[unique] @ shares) + model.bias) - label) * weight
    gradient = error * shares
    squares[unique] += gradient**2
    model.weights[unique] -= rate * gradient / np.sqrt(squares[unique])
    model.bias -= 0.01 * rate * error


def _measured(model: HashedNgrams, rows: Sequence[tuple[NDArray[np.int64], int]]) -> dict[str, float]:
    logits = np.array([float(model.weights[places].mean()) + model.bias for places, _ in rows])
    labels = np.array([label for _, label in rows])
    told = {"texts": float(len(rows)), "accuracy": float(((logits > 0) == labels).mean())}
    good, bad = logits[labels == 1], logits[labels == 0]
    if len(good) and len(bad):
        ranks = np.searchsorted(np.sort(bad), good, side="left"), np.searchsorted(np.sort(bad), good, side="right")
        told["auc"] = float((ranks[0] + ranks[1]).mean() / 2 / len(bad))
    return told
