"""Whose thresholds a document is held to: English, Chinese, code, or any other language."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from megalm.curate.document import Document
from megalm.curate.steps.units import HAN

Profile = Literal["en", "zh", "code", "other"]
ProfileSetting = Literal["auto", "en", "zh", "code", "other"]

_HAN = re.compile(f"[{HAN}]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
_KANA = re.compile("[\u3041-\u30ff]")
_CHINESE = {"zh", "yue", "wuu", "lzh", "cmn"}
_LOOKED_AT = 4000  # characters of a text whose language nobody stated


def profile_of(document: Document, setting: ProfileSetting = "auto") -> Profile:
    """`setting`, unless it is auto: then what metadata say (`language`, as the step of that name writes it, or
    `programming_language`), else what the characters say."""
    if setting != "auto":
        return setting
    if document.metadata.get("programming_language") or document.metadata.get("language") == "code":
        return "code"
    stated = document.metadata.get("language")
    if isinstance(stated, str) and stated:
        code = re.split("[-_]", stated.lower())[0]
        return "en" if code in ("en", "eng") else "zh" if code in _CHINESE else "other"
    sample = document.text[:_LOOKED_AT]
    han, letters = len(_HAN.findall(sample)), sum(map(str.isalpha, sample))
    # A Chinese text that names things in English is still Chinese: an English word takes more letters.
    if han > 0.3 * letters:
        return "zh" if len(_KANA.findall(sample)) < 0.1 * han else "other"
    return "other" if len(_LATIN.findall(sample)) < 0.5 * letters else "en"


def thresholds(settings: Any, document: Document) -> tuple[Profile, Any]:
    """The document's profile, and the branch of a step's settings for it."""
    profile = profile_of(document, settings.profile)
    return profile, getattr(settings, profile)


def spelled(measured: Mapping[str, float]) -> str:
    """For the detail of a rejection."""
    return ", ".join(f"{name} {value:.3g}" for name, value in measured.items())
