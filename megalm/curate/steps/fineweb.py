"""FineWeb's own rules (Penedo et al. 2024, section 3.6): documents that are lists, menus or cut-off lines."""

import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.curate.steps.gopher_repetition import repeated
from megalm.curate.steps.profiles import ProfileSetting, thresholds
from megalm.curate.steps.sentences import ENDS
from megalm.curate.steps.units import units

Share = float | None

_LINE_END = re.compile(rf"[{re.escape(ENDS)}…][\"'”’」』）)》〉】\]\s]*$")
_END = re.compile("[。！？!?]")


class FineWebThresholds(Config):
    """A threshold of null is not asked."""

    min_lines_with_end: Share = Field(0.12, ge=0, le=1)
    """Share of lines that end with a mark that ends sentences."""
    end_anywhere: bool = False
    """Whether it is enough that a line has such a mark somewhere."""
    max_short_lines: Share = Field(0.67, ge=0, le=1)
    """Share of lines of at most short_line characters."""
    short_line: int = Field(30, ge=0)
    """Characters."""
    max_repeated_characters: Share = Field(0.01, ge=0, le=1)
    """Share of characters in lines that were there before."""
    max_line_breaks_per_word: float | None = Field(0.3, ge=0)
    """A list has many."""


class ChineseFineWebThresholds(FineWebThresholds):
    """FineWeb2 asks 0.106 of lines to end and, by words, at most 0.178 line breaks a word; poems have more. A character
    says as much as three letters, and paragraphs may be one line that is cut off at its end."""

    min_lines_with_end: Share = Field(0.1, ge=0, le=1)
    end_anywhere: bool = True
    short_line: int = Field(6, ge=0)
    max_repeated_characters: Share = Field(0.1, ge=0, le=1)
    max_line_breaks_per_word: float | None = Field(0.2, ge=0)


class CodeFineWebThresholds(FineWebThresholds):
    min_lines_with_end: Share = Field(None, ge=0, le=1)
    max_short_lines: Share = Field(None, ge=0, le=1)
    max_repeated_characters: Share = Field(0.3, ge=0, le=1)
    max_line_breaks_per_word: float | None = Field(None, ge=0)


class OtherFineWebThresholds(FineWebThresholds):
    """FineWeb2's, where it does not tell languages apart."""

    max_repeated_characters: Share = Field(0.1, ge=0, le=1)


class FineWebSettings(Config):
    profile: ProfileSetting = "auto"
    """Whose thresholds: auto takes those of the document's language."""
    en: FineWebThresholds = FineWebThresholds()
    """English: those of FineWeb's code, whose share of repeated characters is a tenth of the paper's."""
    zh: ChineseFineWebThresholds = ChineseFineWebThresholds()
    """Chinese."""
    code: CodeFineWebThresholds = CodeFineWebThresholds()
    """Code."""
    other: OtherFineWebThresholds = OtherFineWebThresholds()
    """Any other language."""


class FineWeb(ByDocument):
    kind: ClassVar[str] = "fineweb"
    Settings: ClassVar[type[Config]] = FineWebSettings
    settings: FineWebSettings

    def prepare(self) -> None:
        self.apply([Document("first", "Some words to begin with.")])

    def measure(self, document: Document) -> dict[str, float]:
        lines = [line for line in document.text.split("\n") if line.strip()]
        return {"lines with an end": _with_end(lines, False) if lines else 0.0}

    def verdict(self, document: Document) -> Rejection | None:
        _, asked = thresholds(self.settings, document)
        text = document.text
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return Rejection("no text")
        ends = _with_end(lines, asked.end_anywhere)
        if asked.min_lines_with_end is not None and ends < asked.min_lines_with_end:
            return Rejection("too few lines end a sentence", f"{ends:.0%}")
        short = sum(len(line) <= asked.short_line for line in lines) / len(lines)
        if asked.max_short_lines is not None and short > asked.max_short_lines:
            return Rejection("too many short lines", f"{short:.0%}")
        characters = repeated(lines)[1] / (len(text) - text.count("\n"))
        if asked.max_repeated_characters is not None and characters > asked.max_repeated_characters:
            return Rejection("repeated lines", f"{characters:.0%} of the characters")
        if asked.max_line_breaks_per_word is not None:
            breaks = text.count("\n") / max(1, len(units(text)))
            if breaks > asked.max_line_breaks_per_word:
                return Rejection("a list", f"{breaks:.2f} line breaks a word")
        return None


def _with_end(lines: Sequence[str], anywhere: bool) -> float:
    ended = (bool(_LINE_END.search(line[-20:]) or (anywhere and _END.search(line))) for line in lines)
    return sum(ended) / len(lines)
