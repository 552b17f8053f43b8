"""A page's text, without its menus, advertisements and comments."""

import re
from typing import ClassVar, Literal

from pydantic import Field
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument

_TAGS = "html|head|body|title|meta|link|p|div|span|a|br|table|td|li|ul|h[1-6]|article|section|main|script|img|b|i"
_TAG = re.compile(rf"<(?:!doctype|{_TAGS})\b", re.IGNORECASE)
# Atomic and possessive: what begins with many comments would otherwise be tried in every way to part them.
_COMMENTS = r"(?:<!--(?>.*?-->)\s*+)*+"
_BEGINS = re.compile(rf"[\s\ufeff]*(?:<\?xml[^>]*>\s*)?{_COMMENTS}<(?:!doctype\s+html|{_TAGS})\b", re.I | re.S)


class ExtractHtmlSettings(Config):
    mode: Literal["fast", "best"] = "fast"
    """fast: resiliparse, tens of megabytes a second. best: trafilatura, a tenth of that, leaves less of the page's
    fittings in."""
    plain_text: Literal["keep", "reject"] = "keep"
    """What becomes of a document that is plain text, where a recipe has sources of both kinds: it goes on as it is, or
    it is left out."""
    max_megabytes: float = Field(8.0, gt=0)
    """Larger pages are left out: they are data, and take minutes."""
    min_characters: int = Field(1, ge=1)
    """A page with less text is left out."""


class ExtractHtml(ByDocument):
    """A page is what metadata `content_type` calls HTML or, where there is none (JSONL, Parquet), what begins with a
    tag of HTML. Its title goes into metadata, and `content_type` becomes text/plain."""

    kind: ClassVar[str] = "extract_html"
    Settings: ClassVar[type[Config]] = ExtractHtmlSettings
    settings: ExtractHtmlSettings

    def prepare(self) -> None:
        self.apply([Document("first", "<html><body><p>Some words to begin with.</p></body></html>")])

    def verdict(self, document: Document) -> Rejection | None:
        page = document.text
        if not _is_page(document):
            return None if self.settings.plain_text == "keep" else Rejection("plain text")
        if len(page) > self.settings.max_megabytes * 1e6:
            return Rejection("page too large", f"{len(page) / 1e6:.1f} million characters")
        if not _TAG.search(page):
            return Rejection("not HTML")
        try:
            tree = HTMLTree.parse(page.replace("\x00", ""))
            title = (tree.title or "").strip()
            text = _fast(tree)
            if self.settings.mode == "best":
                text = _best(page, text)
        except Exception as error:  # parsers in C, and pages that nobody thought of: one of them must not stop a task
            return Rejection("HTML that no parser reads", f"{type(error).__name__}: {error}"[:200])
        if len(text.strip()) < self.settings.min_characters:
            return Rejection("no text in the page", f"{len(text.strip())} characters")
        document.text = text.strip()
        document.metadata["content_type"] = "text/plain"
        if title:
            document.metadata.setdefault("title", title)
        return None


def _is_page(document: Document) -> bool:
    """Whether there is anything to extract."""
    stated = document.metadata.get("content_type")
    if isinstance(stated, str) and stated.strip():
        return stated.partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml")
    return _BEGINS.match(document.text) is not None


def _fast(tree: HTMLTree) -> str:
    return str(extract_plain_text(tree, main_content=True, alt_texts=False, links=False, form_fields=False,
                                  noscript=False, comments=False))  # fmt: skip


def _best(page: str, fast: str) -> str:
    import trafilatura  # half a second: only where it is asked for

    found: str = trafilatura.extract(page, favor_precision=True, include_comments=False, include_tables=True) or ""
    # Now and then it takes a caption or a notice for the article.
    return fast if len(found) < 250 and len(fast) > 4 * len(found) else found
