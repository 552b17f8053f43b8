"""Text that went through the wrong encodings gets its characters back."""

import re
import unicodedata
from typing import ClassVar

import ftfy
from pydantic import Field

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument

# What ftfy could mend: controls, UTF-8 read as Latin-1 or Windows-1252, entities, surrogates, ligatures. It reads half
# a megabyte a second, this expression a hundred times that; most text has none of it.
_SUSPICIOUS = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufff9-\uffff\ud800-\udfff\r\u2028\u2029]"
    r"|[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2022\u2026"
    r"\u2030\u2039\u203a\u20ac\u2122]"
    r"|\u00e2\u20ac|&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,8}\d{0,2});"
)
_CONFIG = ftfy.TextFixerConfig(
    normalization=None,  # NFC below. Never NFKC: it turns x² into x2 and ：into :, which nothing brings back
    uncurl_quotes=False,
    fix_character_width=False,
    fix_latin_ligatures=False,
    explain=False,
)


class RepairUnicodeSettings(Config):
    max_lost: float = Field(0.01, ge=0, le=1)
    """A document is left out in which a larger share of characters is lost for good (U+FFFD)."""


class RepairUnicode(ByDocument):
    """By ftfy, where there is something to mend; composed (NFC), which changes no character that is seen. UTF-8 that
    was read as GBK loses bytes and cannot be mended: the Chinese thresholds of gopher_quality leave it out."""

    kind: ClassVar[str] = "repair_unicode"
    Settings: ClassVar[type[Config]] = RepairUnicodeSettings
    settings: RepairUnicodeSettings

    def prepare(self) -> None:
        self.apply([Document("first", "Some words to begin with.")])

    def verdict(self, document: Document) -> Rejection | None:
        text = document.text
        if _SUSPICIOUS.search(text):
            text = ftfy.fix_text(text, _CONFIG)
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        document.text = text
        lost = text.count("\ufffd") / max(1, len(text))
        return Rejection("characters lost", f"{lost:.1%} of them") if lost > self.settings.max_lost else None
