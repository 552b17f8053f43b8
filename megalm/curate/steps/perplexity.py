"""How much a document surprises a language model of good text, in buckets."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load

MODEL, BINARY, TOKENIZER = "model.arpa", "model.bin", "tokenizer"


class ModelSettings(Config):
    path: str
    """A folder that tools/train_perplexity_model.py wrote."""
    buckets: list[float] = []
    """Perplexities at which one bucket ends and the next begins, ascending: metadata `perplexity_bucket` is 0 below the
    first. The audit's distributions show where to put them; CCNet takes thirds of each language."""
    reject_above: float | None = Field(None, gt=0)
    reject_below: float | None = Field(None, gt=0)
    """What is said again and again surprises nobody."""

    @model_validator(mode="after")
    def _ordered(self) -> "ModelSettings":
        if self.buckets != sorted(self.buckets):
            raise ValueError(f"buckets {self.buckets} are not ascending: sort them")
        if self.reject_above is not None and self.reject_below is not None and self.reject_below > self.reject_above:
            raise ValueError(
                f"reject_below {self.reject_below:g} is above reject_above {self.reject_above:g}, which rejects "
                "everything: lower it"
            )
        return self


class PerplexitySettings(Config):
    models: dict[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ModelSettings] = Field(min_length=1)
    """By language (`en`, `zh`), as the step `language` tells it, which belongs before this one. Documents of other
    languages go on without a perplexity."""


class Perplexity(ByDocument):
    """Perplexity per token of a 5-gram model, as CCNet does (Wenzek et al. 2020, section 3.4): each line is a sentence,
    whose end counts as a token. Perplexities compare within a model only. Metadata get `perplexity` and, where there
    are buckets, `perplexity_bucket`."""

    kind: ClassVar[str] = "perplexity"
    Settings: ClassVar[type[Config]] = PerplexitySettings
    settings: PerplexitySettings

    def __init__(self, settings: PerplexitySettings) -> None:
        super().__init__(settings)
        _kenlm()  # what is missing is told before the steps in front of this one have worked

    @cached_property
    def _models(self) -> dict[str, "PerplexityModel"]:
        return {language: PerplexityModel.load(model.path) for language, model in self.settings.models.items()}

    def files(self) -> Sequence[str]:
        found: list[Path] = []
        for folder in (Path(model.path) for model in self.settings.models.values()):
            tokenizer = folder / TOKENIZER
            found += [_ngrams_of(folder), *(sorted(tokenizer.iterdir()) if tokenizer.is_dir() else [tokenizer])]
        return list(map(str, found))

    def prepare(self) -> None:
        for model in self._models.values():
            model.perplexity("Some words to begin with.")

    def measure(self, document: Document) -> dict[str, float]:
        value = document.metadata.get("perplexity")
        return {"perplexity": float(value)} if isinstance(value, int | float) else {}

    def verdict(self, document: Document) -> Rejection | None:
        language = document.metadata.get("language")
        if language is None:
            raise MegalmError("perplexity goes by a document's language: put the step language before it")
        settings = self.settings.models.get(str(language))
        if settings is None:
            return None
        value = self._models[str(language)].perplexity(document.text)
        if value is None:
            return Rejection("no text")
        document.metadata["perplexity"] = round(value, 1)
        if settings.buckets:
            document.metadata["perplexity_bucket"] = sum(value >= bound for bound in settings.buckets)
        if settings.reject_above is not None and value > settings.reject_above:
            return Rejection("perplexity too high", f"{value:.0f}")
        if settings.reject_below is not None and value < settings.reject_below:
            return Rejection("perplexity too low", f"{value:.0f}")
        return None


@dataclass(frozen=True)
class PerplexityModel:
    """An n-gram model whose words are a tokenizer's ids."""

    ngrams: Any
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> "PerplexityModel":
        """Raises MegalmError if the folder holds no such model."""
        folder = Path(folder)
        path = _ngrams_of(folder)
        if not path.exists():
            raise MegalmError(
                f"there is no perplexity model in {folder}: name a folder that tools/train_perplexity_model.py wrote"
            )
        kenlm = _kenlm()
        config = kenlm.Config()
        config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        try:
            ngrams = kenlm.Model(str(path), config)
        except (OSError, RuntimeError) as error:
            raise MegalmError(f"the perplexity model {path} cannot be read ({error}): train it again") from None
        return cls(ngrams, load(folder / TOKENIZER))

    def perplexity(self, text: str) -> float | None:
        """Per token; None of a text without any."""
        lines = list(lines_of(text, self.tokenizer))
        if not lines:
            return None
        total: float = sum(self.ngrams.score(" ".join(map(str, line))) for line in lines)
        tokens = sum(len(line) + 1 for line in lines)
        return float(10 ** min(-total / tokens, 300.0))


def lines_of(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each line that holds something."""
    text = text.encode("utf-8", "replace").decode()  # without lone surrogates
    return tokenizer.encode_batch([line for line in map(str.strip, text.split("\n")) if line])


def _ngrams_of(folder: Path) -> Path:
    return folder / BINARY if (folder / BINARY).exists() else folder / MODEL


def _kenlm() -> Any:
    try:
        import kenlm
    except ImportError:
        raise MegalmError("perplexity needs kenlm, which is not installed: pip install 'megalm[perplexity]'") from None
    return kenlm
