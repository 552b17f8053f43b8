"""Traditional characters become simplified ones."""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

import zhconv

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Step
from megalm.curate.steps.units import HAN

_HAN = re.compile(f"[{HAN}]")
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")


class SimplifyChineseSettings(Config):
    words: Literal["none", "mainland"] = "none"
    """none: characters only. mainland: also the mainland's words where they differ (軟體 becomes 软件)."""


class SimplifyChinese(Step):
    """Converted by MediaWiki's tables (zhconv), longest match first, so that 乾隆 stays 乾隆 while 乾燥 becomes 干燥.
    Japanese, which has kana, is left alone."""

    kind: ClassVar[str] = "simplify_chinese"
    Settings: ClassVar[type[Config]] = SimplifyChineseSettings
    settings: SimplifyChineseSettings

    def prepare(self) -> None:
        self.apply([Document("first", "開始")])

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        target = "zh-hans" if self.settings.words == "none" else "zh-cn"
        for document in documents:
            text = document.text
            han = len(_HAN.findall(text))
            if not han or len(_KANA.findall(text)) > 0.1 * han:
                continue
            document.text = zhconv.convert(text, target)
        return [None] * len(documents)
