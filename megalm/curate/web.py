"""What a web server sent, as text: HTTP messages and the encodings of pages."""

import codecs
import importlib
import re
import zlib
from collections.abc import Callable

DECLARATIONS = [
    re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE),
    re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]+)"""),
]
# As browsers do (WHATWG): pages that declare the smaller set use the larger one.
WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "x-gbk": "gb18030", "iso-8859-1": "cp1252", "latin1": "cp1252"}
WIDER |= {"iso8859-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252"}
WIDER |= {"shift_jis": "cp932", "euc-kr": "cp949", "euc_kr": "cp949", "big5": "big5hkscs"}
MARKS = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
NOT_OF_PAGES = {"undefined", "idna", "punycode", "utf-7"}
NOT_OF_PAGES |= {"unicode-escape", "unicode_escape", "raw-unicode-escape", "raw_unicode_escape"}
"""Codecs of Python's that raise, or give what is no text, whatever a page says."""
SEVEN_BITS = ("iso2022", "hz")
"""How the names of encodings begin whose text is ASCII too."""
BEYOND_ASCII = re.compile(r"[^\x00-\x7f\ufffd]+")
LOOKED_AT = 4096
"""Bytes of a page in which a declaration is looked for."""


class NotHttp(ValueError):
    """Why a message cannot be read: a few words, the same for all messages it befalls."""


def parse_http(message: bytes, largest: int) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in small letters) and decoded body of a response of at most `largest` bytes."""
    head, gap, body = message.partition(b"\r\n\r\n")
    if not gap:
        head, gap, body = message.partition(b"\n\n")
    first, *lines = head.decode("latin-1").splitlines() or [""]
    match = re.match(r"HTTP/\S+\s+(\d{3})", first)
    if match is None:
        raise NotHttp("no HTTP response")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _unchunked(body)
    return int(match[1]), headers, _decoded(body, headers.get("content-encoding", "").lower().strip(), largest)


def _unchunked(body: bytes) -> bytes:
    """A chunked body in one; as it is where it is none, since many crawlers keep the header of what they decoded."""
    parts: list[bytes] = []
    place = 0
    while True:
        end = body.find(b"\n", place, place + 100)
        size = re.match(rb"\s*([0-9a-fA-F]+)\s*(;.*)?\s*$", body[place:end]) if end >= 0 else None
        if size is None:
            return b"".join(parts) if parts else body
        count = int(size[1], 16)
        if count == 0:
            return b"".join(parts)
        parts.append(body[end + 1 : end + 1 + count])
        place = end + 1 + count
        place += 2 if body[place : place + 2] == b"\r\n" else 1


def _decoded(body: bytes, coding: str, largest: int) -> bytes:
    if coding in ("", "identity", "none", "utf-8"):
        return body
    try:
        if coding in ("gzip", "x-gzip", "deflate"):
            if coding != "deflate" and not body.startswith(b"\x1f\x8b"):
                return body  # decoded already
            for window in (47, -15):  # what servers call deflate comes with and without a header
                try:
                    decompressor = zlib.decompressobj(window)
                    content = decompressor.decompress(body, largest + 1)
                except zlib.error:
                    continue
                if len(content) > largest:
                    raise NotHttp("too large")
                return content
            raise NotHttp("a body that does not decompress")
        if coding == "br":
            if re.match(rb"\s*<", body):
                return body
            decoder = importlib.import_module("brotli").Decompressor()
            plain: bytes = decoder.process(body, output_buffer_limit=largest + 1)  # a small body may hold gigabytes
            if len(plain) > largest:
                raise NotHttp("too large")
            if not decoder.is_finished():
                raise NotHttp("a body that does not decompress")
            return plain
    except ImportError:
        raise NotHttp("a body compressed by brotli, which is not installed") from None
    except NotHttp:
        raise
    except Exception as error:  # brotli's own error class
        raise NotHttp("a body that does not decompress") from error
    raise NotHttp("a body in an unknown content encoding")


def decode_page(content: bytes, declared: str | None = None) -> tuple[str, str]:
    """(text, encoding) of a page, with U+FFFD for what is broken. declared: the charset of its HTTP header.

    By its byte-order mark; as UTF-8 if nearly all of it is; by `declared` or the page's own declaration, if nearly all
    of it fits; else as a detector says. UTF-8 comes before what is declared: text in another encoding is hardly ever
    UTF-8 by chance, but pages are often converted and their heads left as they were.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content.decode(encoding, "replace"), encoding.removesuffix("-sig")
    head = content[:LOOKED_AT]
    found = [match[1].decode("latin-1") for pattern in DECLARATIONS if (match := pattern.search(head))]
    codecs_declared = [codec for name in (declared, *found) if (codec := _codec(name))]
    tried = list(dict.fromkeys([*filter(_before_utf8(head), codecs_declared), "utf-8", *codecs_declared]))
    for encoding in tried:
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            text = content.decode(encoding, "replace")
            if text.count("\ufffd") <= 0.02 * sum(map(len, BEYOND_ASCII.findall(text))):
                return text, encoding
    detected = _codec(_detect(content)) or "utf-8"
    return content.decode(detected, "replace"), detected


def _before_utf8(head: bytes) -> Callable[[str], bool]:
    """Whether a declared encoding is tried first, since its text may be UTF-8 to the letter and yet something else."""
    wide = b"\0" in head
    return lambda codec: codec.startswith(SEVEN_BITS) or (wide and codec.startswith(("utf-16", "utf-32")))


def _codec(name: str | None) -> str | None:
    """Python's name of a charset, the wider one of its kind; None if there is none."""
    if not name:
        return None
    name = name.strip().strip("\"'").lower()
    try:
        codec = codecs.lookup(WIDER.get(name, name))
    except (LookupError, ValueError):
        return None
    text = getattr(codec, "_is_text_encoding", True) and codec.name not in NOT_OF_PAGES
    return WIDER.get(codec.name, codec.name) if text else None


def _detect(content: bytes) -> str | None:
    try:
        found: str | None = importlib.import_module("resiliparse.parse.encoding").detect_encoding(content)
    except ImportError:
        return None
    return found


def charset(content_type: str) -> str | None:
    """Of a Content-Type header."""
    match = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", content_type, re.IGNORECASE)
    return match[1] if match else None
