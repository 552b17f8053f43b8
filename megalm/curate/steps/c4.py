"""C4's rules (Raffel et al. 2020, section 2.2, and its code): sentences stay, what pages are fitted with goes."""

import re
from typing import ClassVar

from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument
from megalm.curate.steps.profiles import Profile, ProfileSetting, thresholds
from megalm.curate.steps.sentences import ENDED, clauses, sentences, unspaced_words
from megalm.curate.steps.units import HAN

_EN_PHRASES = ["terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"]
_ZH_PHRASES = [
    "版权所有",
    "隐私政策",
    "隐私权政策",
    "用户协议",
    "使用条款",
    "使用cookie",
    "icp备",
    "公网安备",
    "免责声明：",
    "點擊查看",
    "隱私權政策",
]


class C4Thresholds(Config):
    only_ended_lines: bool = True
    """Keep only lines that end with a mark that ends sentences (in Thai and Lao, which have none, those that hold a
    clause), and not with an ellipsis. FineWeb goes without."""
    min_words_per_line: int = Field(3, ge=0)
    """Shorter lines go. Words; in Chinese characters. Of other scripts without spaces 1.6 characters (Japanese) or 4
    letters (Thai, Lao, Burmese, Khmer) count as a word."""
    max_word_length: int = Field(1000, ge=1)
    """A line with a longer stretch without white space goes, unless its script has no spaces between words."""
    min_sentences: int = Field(5, ge=0)
    """A document with fewer sentences in the lines that stay goes."""
    javascript: bool = True
    """Whether lines that speak of JavaScript go."""
    lorem_ipsum: bool = True
    """Whether documents with lorem ipsum go."""
    curly_bracket: bool = True
    """Whether documents with a curly bracket go: it keeps code out of text."""
    citations: bool = True
    """Whether marks such as [12] and [citation needed] are cut out."""
    phrases: list[str] = _EN_PHRASES
    """Lines with one of these go; in lower case."""


class ChineseC4Thresholds(C4Thresholds):
    """A stretch without white space is a paragraph."""

    min_words_per_line: int = Field(5, ge=0)
    max_word_length: int = Field(1_000_000, ge=1)
    min_sentences: int = Field(2, ge=0)
    phrases: list[str] = [*_EN_PHRASES, *_ZH_PHRASES]


class CodeC4Thresholds(C4Thresholds):
    """Code loses no line."""

    only_ended_lines: bool = False
    min_words_per_line: int = Field(0, ge=0)
    max_word_length: int = Field(10_000, ge=1)
    min_sentences: int = Field(0, ge=0)
    javascript: bool = False
    curly_bracket: bool = False
    citations: bool = False
    phrases: list[str] = []


class C4Settings(Config):
    profile: ProfileSetting = "auto"
    """Whose thresholds: auto takes those of the document's language."""
    en: C4Thresholds = C4Thresholds()
    """English: the paper's."""
    zh: ChineseC4Thresholds = ChineseC4Thresholds()
    """Chinese."""
    code: CodeC4Thresholds = CodeC4Thresholds()
    """Code."""
    other: C4Thresholds = C4Thresholds()
    """Any other language."""


class C4(ByDocument):
    """Without the paper's list of bad words, whose loss is known (Dodge et al. 2021, section 5.3)."""

    kind: ClassVar[str] = "c4"
    Settings: ClassVar[type[Config]] = C4Settings
    settings: C4Settings

    def verdict(self, document: Document) -> Rejection | None:
        profile, asked = thresholds(self.settings, document)
        kept, count = [], 0
        lines = document.text.splitlines()
        for raw in lines:
            line = raw.rstrip() if profile == "code" else raw.strip()
            if asked.citations and "[" in line:
                line = _CITATION.sub("", line)
            lowered = line.lower()
            if asked.lorem_ipsum and "lorem ipsum" in lowered:
                return Rejection("lorem ipsum")
            if not _stays(line, lowered, profile, asked):
                continue
            if asked.curly_bracket and "{" in line:
                return Rejection("curly bracket")
            if asked.min_sentences:
                count += sentences(line)
            kept.append(line)
        if count < asked.min_sentences:
            return Rejection("too few sentences", f"{count}")
        if not any(kept):
            return Rejection("no lines left", f"of {len(lines)}")
        document.text = "\n".join(kept).strip("\n")
        return None


_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]|\[来源请求]|\[编辑]")
_ENDS = (".", "?", "!", '"', "'", "。", "！", "？", "”", "’", "」", "』", "；")
_ZH_ENDS = (*_ENDS, "，", "：", "、")  # half a couplet is a line
_OTHER_ENDS = (*_ENDS, "“", "»", "«")  # quotation marks close in either way
_ELLIPSES = ("...", "…")
_HAN = re.compile(f"[{HAN}]")


def _too_long(stretch: str, most: int) -> bool:
    return len(stretch) > most and unspaced_words(stretch) < len(stretch) / 10


def _ended(line: str, profile: Profile) -> bool:
    if profile != "other":
        return line.endswith(_ZH_ENDS if profile == "zh" else _ENDS)
    return line.endswith(_OTHER_ENDS) or bool(ENDED.search(line[-20:]) or clauses(line))


def _stays(line: str, lowered: str, profile: Profile, asked: C4Thresholds) -> bool:
    stretches = line.split()
    if len(line) > asked.max_word_length and any(_too_long(each, asked.max_word_length) for each in stretches):
        return False
    if asked.only_ended_lines and (not _ended(line, profile) or line.endswith(_ELLIPSES)):
        return False
    if asked.min_words_per_line:
        unspaced = len(_HAN.findall(line)) if profile == "zh" else unspaced_words(line)
        if len(stretches) + unspaced < asked.min_words_per_line:
            return False
    if asked.javascript and "javascript" in lowered:
        return False
    return not any(phrase in lowered for phrase in asked.phrases)
