"""What ends a sentence, and what a word is, in scripts of which each has its own way."""

import re

from megalm.curate.steps.units import CJK_LETTERS

ENDS = ".?!。！？｡．‼⁇⁈⁉؟۔।॥։܀።፧။៕។།"
"""Marks that end sentences: Latin, Greek, Cyrillic; Chinese, Japanese; Arabic, Urdu; the scripts of India; Armenian,
Syriac, Ethiopic, Burmese, Khmer, Tibetan."""
_CLOSING = "\"'”’“»›」』）)》〉】\\]"
ENDED = re.compile(rf"[{re.escape(ENDS)}][{_CLOSING}\s]*$")
"""A line that ends with such a mark, or with what closes behind it."""
# Not within a number. Tried once for a row of marks, not from each of them on.
_STOP = rf"(?<![.!?])[.!?]++[{_CLOSING}]*+(?=\s|$)"
_ASCII_SENTENCE = re.compile(_STOP)  # twice as quick
_SENTENCE = re.compile(rf"{_STOP}|[{re.escape(ENDS.replace('.?!', ''))}]+")
_CLAUSE = re.compile("[\u0e01-\u0e4e\u0e81-\u0ece]{20,}")
_CJK = re.compile(f"[{CJK_LETTERS}]")
_LETTERS = re.compile("[\u0e01-\u0e4e\u0e81-\u0ece\u1000-\u104f\u1780-\u17dd]")


def clauses(line: str) -> int:
    """Of Thai and Lao, which have no mark that ends a sentence: what spaces part there, if it has twenty letters (about
    five words), as an entry of a menu has not."""
    return 0 if line.isascii() else len(_CLAUSE.findall(line))


def sentences(line: str) -> int:
    """At least one."""
    if line.isascii():
        return len(_ASCII_SENTENCE.findall(line)) or 1
    return max(1, len(_SENTENCE.findall(line)), clauses(line))


def unspaced_words(text: str) -> int:
    """About how many more words there are than spaces part, in scripts that have none between words: one for 1.6
    characters (Chinese, Japanese) or for 4 letters (Thai, Lao, Burmese, Khmer)."""
    if text.isascii():
        return 0
    return int(len(_CJK.findall(text)) / 1.6) + len(_LETTERS.findall(text)) // 4
