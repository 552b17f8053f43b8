"""Gopher's rules on what a document is made of (Rae et al. 2021, appendix A.1.1), with thresholds per language.

The paper's rules are for English. Its mean word length rejects nearly all Chinese, which has no spaces, and its stop
words are not there; so the Chinese thresholds ask what tells Chinese prose, old or new, from noise: how many of its
characters are Chinese, how many of those are the few hundred that any text is made of, how many are function words,
and whether punctuation stands between words.
"""

import re
from functools import cache, cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.curate.steps.chinese import common_characters, function_characters
from megalm.curate.steps.profiles import ProfileSetting, thresholds
from megalm.curate.steps.units import CJK, HAN, LETTER, SPACE, Units, classes, code_points, hash_of, units

Share = float | None


class GopherThresholds(Config):
    """A threshold of null is not asked."""

    min_words: int | None = Field(50, ge=0)
    """Words, or characters in Chinese."""
    max_words: int | None = Field(100_000, ge=0)
    """Words, or characters in Chinese."""
    min_mean_word_length: float | None = Field(3.0, ge=0)
    """Characters."""
    max_mean_word_length: float | None = Field(10.0, ge=0)
    """Characters."""
    max_symbols_per_word: float | None = Field(0.1, ge=0)
    """Of hash signs, and of ellipses."""
    max_bullet_lines: Share = Field(0.9, ge=0, le=1)
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: Share = Field(0.3, ge=0, le=1)
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: Share = Field(0.8, ge=0, le=1)
    """Share of words that have a letter."""
    min_stop_words: int = Field(2, ge=0)
    """How many different ones of stop_words there must be."""
    stop_words: list[str] = ["the", "be", "to", "of", "and", "that", "have", "with"]
    """In lower case."""
    min_han: Share = Field(None, ge=0, le=1)
    """Share of Chinese characters among all but white space."""
    min_common_han: Share = Field(None, ge=0, le=1)
    """Share of the about 1,000 most frequent characters among Chinese characters. Characters at random and garbled
    encodings have few."""
    min_function_han: Share = Field(None, ge=0, le=1)
    """Share of function words (的, 是, 不, 之) among Chinese characters. Lists of key words have few."""
    max_stray_marks: Share = Field(None, ge=0, le=1)
    """Share of punctuation that stands where none can: first on a line, behind a different one, around one character;
    brackets that close what nothing opened. Characters in random order have a lot."""


class ChineseGopherThresholds(GopherThresholds):
    min_words: int | None = Field(20, ge=0)
    max_words: int | None = Field(200_000, ge=0)
    min_mean_word_length: float | None = Field(None, ge=0)
    max_mean_word_length: float | None = Field(None, ge=0)
    min_alphabetic_words: Share = Field(0.7, ge=0, le=1)
    min_stop_words: int = Field(1, ge=0)
    stop_words: list[str] = list(function_characters())
    min_han: Share = Field(0.2, ge=0, le=1)
    min_common_han: Share = Field(0.5, ge=0, le=1)
    min_function_han: Share = Field(0.025, ge=0, le=1)
    max_stray_marks: Share = Field(0.05, ge=0, le=1)


class CodeGopherThresholds(GopherThresholds):
    min_words: int | None = Field(10, ge=0)
    min_mean_word_length: float | None = Field(1.5, ge=0)
    max_mean_word_length: float | None = Field(25.0, ge=0)
    max_symbols_per_word: float | None = Field(None, ge=0)
    max_bullet_lines: Share = Field(None, ge=0, le=1)
    max_ellipsis_lines: Share = Field(None, ge=0, le=1)
    min_alphabetic_words: Share = Field(0.4, ge=0, le=1)
    min_stop_words: int = Field(0, ge=0)


class OtherGopherThresholds(GopherThresholds):
    min_mean_word_length: float | None = Field(2.0, ge=0)
    max_mean_word_length: float | None = Field(14.0, ge=0)
    min_stop_words: int = Field(0, ge=0)


class GopherQualitySettings(Config):
    profile: ProfileSetting = "auto"
    """Whose thresholds: auto takes those of the document's language."""
    en: GopherThresholds = GopherThresholds()
    """English: the paper's."""
    zh: ChineseGopherThresholds = ChineseGopherThresholds()
    """Chinese."""
    code: CodeGopherThresholds = CodeGopherThresholds()
    """Code."""
    other: OtherGopherThresholds = OtherGopherThresholds()
    """Any other language: English's without its stop words, and with longer words."""


class GopherQuality(ByDocument):
    kind: ClassVar[str] = "gopher_quality"
    Settings: ClassVar[type[Config]] = GopherQualitySettings
    settings: GopherQualitySettings

    def prepare(self) -> None:
        self.apply([Document("first", "Some words to begin with.")])

    def measure(self, document: Document) -> dict[str, float]:
        found = units(document.text)
        lengths = _word_lengths(found)
        mean = {"mean word length": float(lengths.mean())} if len(lengths) else {}  # of Chinese text there is none
        return {"words": float(len(found)), **mean}

    @cached_property
    def _stop_hashes(self) -> dict[str, NDArray[np.uint64]]:
        return {
            profile: np.array([hash_of(word) for word in getattr(self.settings, profile).stop_words], dtype=np.uint64)
            for profile in ("en", "zh", "code", "other")
        }

    def verdict(self, document: Document) -> Rejection | None:
        text = document.text
        profile, asked = thresholds(self.settings, document)
        found = units(text.lower())
        count = len(found)
        if not count:
            return Rejection("no words")
        if _below(count, asked.min_words):
            return Rejection("too few words", str(count))
        if _above(count, asked.max_words):
            return Rejection("too many words", str(count))
        lengths = _word_lengths(found)
        # Of a text without spaces the few foreign words say nothing.
        if len(lengths) > count / 2:
            mean = float(lengths.mean())
            if _below(mean, asked.min_mean_word_length):
                return Rejection("words too short", f"{mean:.2f} characters")
            if _above(mean, asked.max_mean_word_length):
                return Rejection("words too long", f"{mean:.2f} characters")
        words = count + found.symbols
        return (
            self._symbols(text, words, asked)
            or self._lines(text, asked)
            or self._alphabetic(found, words, asked)
            or self._stop_words(found, self._stop_hashes[profile], asked.min_stop_words)
            or _chinese(text, asked)
        )

    def _symbols(self, text: str, words: int, asked: GopherThresholds) -> Rejection | None:
        hashes, ellipses = text.count("#") / words, (text.count("...") + _ellipses(text)) / words
        if _above(hashes, asked.max_symbols_per_word):
            return Rejection("too many hash signs", f"{hashes:.2f} a word")
        if _above(ellipses, asked.max_symbols_per_word):
            return Rejection("too many ellipses", f"{ellipses:.2f} a word")
        return None

    def _lines(self, text: str, asked: GopherThresholds) -> Rejection | None:
        lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
        bullets = sum(line.startswith(_BULLETS) for line in lines) / len(lines)
        if _above(bullets, asked.max_bullet_lines):
            return Rejection("nearly all lines are bullets", f"{bullets:.0%}")
        ellipses = sum(line.endswith(("...", "…")) for line in lines) / len(lines)
        if _above(ellipses, asked.max_ellipsis_lines):
            return Rejection("too many lines end with an ellipsis", f"{ellipses:.0%}")
        return None

    def _alphabetic(self, found: Units, words: int, asked: GopherThresholds) -> Rejection | None:
        letters = np.concatenate([[0], np.cumsum((found.classes == LETTER) | (found.classes == CJK), dtype=np.int32)])
        share = int((letters[found.ends] > letters[found.starts]).sum()) / words
        return (
            Rejection("too few words with letters", f"{share:.0%}")
            if _below(share, asked.min_alphabetic_words)
            else None
        )

    def _stop_words(self, found: Units, stop: NDArray[np.uint64], least: int) -> Rejection | None:
        present = 0
        for hashed in stop if least else ():
            present += bool((found.hashes == hashed).any())
            if present >= least:
                return None
        return Rejection("too few stop words", f"{present}") if least else None


_BULLETS = ("•", "-", "●", "·", "*", "◆", "■", "▪", "‣", "–")


def _ellipses(text: str) -> int:
    """…… is the Chinese one."""
    return text.count("…") - text.count("……")


def _word_lengths(found: Units) -> NDArray[np.int32]:
    """Of words, without CJK characters."""
    return (found.ends - found.starts)[found.classes[found.starts] != CJK]


def _below(value: float, least: float | None) -> bool:
    return least is not None and value < least


def _above(value: float, most: float | None) -> bool:
    return most is not None and value > most


# Chinese

_STOP = re.compile("[，。、；：？！《》「」『』“”【】]")
# Where none can stand: first on a line, behind another one, and two around a single character. The same mark again and
# again (。。。) is what people do write.
_STRAY = re.compile(
    r"(?m)^[^\S\n]*[，。、；：？！]"
    r"|[，、；：。](?=[^\S\n]*[，、；：。？！])(?<!，(?=，))(?<!。(?=。))"
    rf"|(?<=[，。；：？！])[{HAN}](?=[，。；：？！])"
)
_BRACKETS = re.compile("[《》「」『』“”【】]")
_OPENS = {"》": "《", "」": "「", "』": "『", "”": "“", "】": "【"}


def _stray_marks(text: str) -> int:
    """Stops where none can stand, and closing brackets that nothing opened."""
    opened = dict.fromkeys(_OPENS.values(), 0)
    closing = 0
    for mark in _BRACKETS.findall(text):
        if mark in opened:
            opened[mark] += 1
        elif opened[_OPENS[mark]]:
            opened[_OPENS[mark]] -= 1
        else:
            closing += 1
    return closing + len(_STRAY.findall(text))


def _chinese(text: str, asked: GopherThresholds) -> Rejection | None:
    if asked.min_han is None and asked.min_common_han is None and asked.min_function_han is None:
        return None
    counts = np.bincount(_kinds()[np.minimum(code_points(text), 0xFFFF)], minlength=5)
    _, han, common, function, space = map(int, counts[:5])
    han = han + common + function
    share = han / max(1, len(text) - space)
    if _below(share, asked.min_han):
        return Rejection("too few Chinese characters", f"{share:.0%}")
    if _below((common + function) / max(1, han), asked.min_common_han):
        return Rejection("too few common characters", f"{(common + function) / max(1, han):.0%}")
    if _below(function / max(1, han), asked.min_function_han):
        return Rejection("too few function words", f"{function / max(1, han):.1%}")
    stops = len(_STOP.findall(text))
    stray = _stray_marks(text) if asked.max_stray_marks is not None else 0
    if _above(stray / max(1, stops), asked.max_stray_marks):
        return Rejection("punctuation at impossible places", f"{stray} of {stops}")
    return None


@cache
def _kinds() -> NDArray[np.uint8]:
    """Of code points below 0x10000: 1 a Chinese character, 2 a common one, 3 a function word, 4 white space, else 0."""
    table = np.zeros(0x10000, dtype=np.uint8)
    of = classes()[:0x10000]
    for match in re.finditer(f"[{HAN}]", "".join(map(chr, range(0x10000)))):
        table[match.start()] = 1
    table[of == SPACE] = 4
    for characters, kind in ((common_characters(), 2), (function_characters(), 3)):
        table[[ord(character) for character in characters]] = kind
    return table
