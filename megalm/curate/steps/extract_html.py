"""A page's text, without its menus, advertisements and comments."""

import codecs
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding
from resiliparse.parse.html import HTMLTree

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import Step

_ESCAPED = re.compile("[\udc80-\udcff]")
_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]+)""", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9_:.-]+)""")
_TAG = re.compile(
    r"<(?:!doctype|html|head|body|title|p|div|span|a|br|table|td|li|ul|h[1-6]|article|script|img|b|i)\b", re.I
)


class ExtractHtmlSettings(Config):
    mode: Literal["fast", "best"] = "fast"
    """fast: resiliparse, tens of megabytes a second. best: trafilatura, a tenth of that, leaves less of the page's
    fittings in."""
    plain_text: Literal["reject", "keep"] = "reject"
    """What becomes of a document that is no HTML, where a recipe has sources of both kinds."""
    max_megabytes: float = Field(8.0, gt=0)
    """Larger pages are left out: they are data, and take minutes."""
    min_characters: int = Field(1, ge=1)
    """A page with less text is left out."""


class ExtractHtml(Step):
    """text: the page, as a reader decodes it, either rightly or as UTF-8 with `surrogateescape`, which keeps every
    byte: then its encoding is found here, with the help of metadata `charset` if the server stated one. The page's
    title goes into metadata."""

    kind: ClassVar[str] = "extract_html"
    Settings: ClassVar[type[Config]] = ExtractHtmlSettings
    settings: ExtractHtmlSettings

    def apply(self, documents: Sequence[Document]) -> list[Rejection | None]:
        return [self._extract(document) for document in documents]

    def _extract(self, document: Document) -> Rejection | None:
        page = document.text
        if len(page) > self.settings.max_megabytes * 1e6:
            return Rejection("page too large", f"{len(page) / 1e6:.1f} million characters")
        if not _TAG.search(page):
            return None if self.settings.plain_text == "keep" else Rejection("not HTML")
        if _ESCAPED.search(page):
            stated = document.metadata.get("charset")
            page = decode(page.encode("utf-8", "surrogateescape"), stated if isinstance(stated, str) else None)
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
        if title:
            document.metadata.setdefault("title", title)
        return None


def decode(body: bytes, stated: str | None = None) -> str:
    """A page's bytes as text: by its byte order mark, as UTF-8 if that is what it is, by the encoding that the server
    or the page states if it fits, else by the frequencies of its bytes.

    UTF-8 comes before what is stated: other encodings are never UTF-8 by chance, but pages are often converted and
    their heads left as they were.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        # One broken byte in a page of UTF-8 (cut short, or a foreign snippet) does not make it something else.
        if error.start > 1000 and body.count(b"\xef\xbf\xbd") == 0 and _mostly_utf8(body):
            return body.decode("utf-8", "replace")
    head = body[:4096]
    for claimed in (stated, *(match.group(1).decode() for pattern in (_META, _XML) if (match := pattern.search(head)))):
        encoding = _codec(claimed)
        if encoding and encoding != "utf-8":
            try:
                return body.decode(encoding)
            except UnicodeDecodeError as error:
                # A stray byte near nothing: still the encoding that was stated, unless it is wrong from the beginning.
                text = body.decode(encoding, "replace")
                if text.count("\ufffd") < 0.001 * len(text) + 2 and error.start > 200:
                    return text
    return body.decode(_codec(detect_encoding(body)) or "utf-8", "replace")


def _mostly_utf8(body: bytes) -> bool:
    text = body.decode("utf-8", "replace")
    beyond = sum(map(len, re.findall(r"[^\x00-\x7f\ufffd]+", text)))
    return text.count("\ufffd") < 0.02 * beyond


def _codec(name: str | None) -> str | None:
    """Python's name; browsers read GB2312 and GBK as GB18030, and Latin-1 as Windows-1252."""
    try:
        found = codecs.lookup((name or "").strip()).name
    except LookupError:
        return None
    return {"gb2312": "gb18030", "gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "cp1252"}.get(found, found)


def _fast(tree: HTMLTree) -> str:
    return str(extract_plain_text(tree, main_content=True, alt_texts=False, links=False, form_fields=False,
                                  noscript=False, comments=False))  # fmt: skip


def _best(page: str, fast: str) -> str:
    import trafilatura  # half a second: only where it is asked for

    found: str = trafilatura.extract(page, favor_precision=True, include_comments=False, include_tables=True) or ""
    # Now and then it takes a caption or a notice for the article.
    return fast if len(found) < 250 and len(fast) > 4 * len(found) else found
