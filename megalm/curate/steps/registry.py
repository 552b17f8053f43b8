"""The steps by the name that a recipe uses. Importing this costs nothing."""

import difflib
import importlib
from typing import TYPE_CHECKING

from megalm.errors import MegalmError

if TYPE_CHECKING:  # naming a step costs nothing: its libraries load when a recipe asks for it
    from megalm.curate.step import Step

_ROOM = "megalm.curate.steps"
KINDS = {
    "extract_html": "extract_html:ExtractHtml",
    "repair_unicode": "repair_unicode:RepairUnicode",
    "simplify_chinese": "simplify_chinese:SimplifyChinese",
    "language": "language:Language",
    "c4": "c4:C4",
    "gopher_quality": "gopher_quality:GopherQuality",
    "gopher_repetition": "gopher_repetition:GopherRepetition",
    "fineweb": "fineweb:FineWeb",
    "quality_classifier": "quality_classifier:QualityClassifier",
    "exact_documents": "exact_documents:ExactDocuments",
    "exact_paragraphs": "exact_paragraphs:ExactParagraphs",
    "exact_substrings": "exact_substrings:ExactSubstrings",
    "near_duplicates": "near_duplicates:NearDuplicates",
    "privacy": "privacy:Privacy",
    "decontaminate": "decontaminate:Decontaminate",
    "domains": "lists:Domains",
    "licences": "lists:Licences",
    "sample": "sample:Sample",
}
"""kind -> "module:Class", the module below megalm.curate.steps."""


def step_class(kind: str) -> "type[Step]":
    """The class of a recipe's step; raises MegalmError if there is none of that name, or if its package is missing."""
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        way_out = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(KINDS)}"
        raise MegalmError(f"there is no step {kind!r}: {way_out}")
    module, name = KINDS[kind].split(":")
    try:
        found: type[Step] = getattr(importlib.import_module(f"{_ROOM}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("megalm"):
            raise
        raise MegalmError(
            f"the step {kind} needs the package {error.name}, which is not installed: pip install 'megalm[curate]'"
        ) from error
    return found
