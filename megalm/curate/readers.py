"""Files become documents. Every reader starts at any position it has told, and tells one after everything it finds.

A position is an integer: bytes of the decompressed content (JSONL, most WARC), bytes of the file (a .warc.gz of a
member per record), rows (Parquet), and 0 where a file is a document.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megalm.curate import warc, web
from megalm.curate.document import Document
from megalm.curate.recipe import Source
from megalm.curate.sources import LANGUAGES, File, is_url, open_binary
from megalm.data.corpus import decompressed
from megalm.errors import MegalmError

SEPARATOR = "@"
"""Between the file and the position, in the id of a document that is not a file of its own."""
EXCERPT = 300
"""Characters that are kept of what cannot be read."""
MAYBE_SURROGATE = (b"\\ud", b"\\uD", b"\xed")
"""What a line of JSON has in it that holds half a character, escaped or not; most such lines are in order."""
PLAIN = (str, int, float, bool, type(None), list, dict)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Something that should have been a document. place: as the id of a document. reason: a few words, the same for all
    that it befalls."""

    place: str
    reason: str
    detail: str = ""
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Something that was never meant to be a document, such as the request record of a page."""

    reason: str


Found = Document | Malformed | PassedOver


class Reader(ABC):
    """Of one file of a source."""

    is_whole_file = False
    """Whether a file is one document, whose id then needs no position."""

    def __init__(self, source: Source, file: File) -> None:
        self.source, self.file = source, file
        self.largest = source.largest_megabytes * 2**20
        self.bytes_read = 0
        """Of the file as it is stored: for progress only."""
        self._raw: BinaryIO | None = None

    def read(self, start: int | None = None) -> Iterator[tuple[Found, int]]:
        """What there is from `start` (default: the start of this part) to the end of this part, each with the position
        behind it. A file that cannot be read, or not to its end, yields a Malformed in the end.

        Raises MegalmError if a remote storage fails: its files would be there the next time.
        """
        position = self.file.start if start is None else start
        if position == warc.END:
            return
        try:
            self._raw = open_binary(self.file.path)
            with self._raw:
                for found, after in self._read(self._raw, position):
                    self.bytes_read, position = self._place(), after
                    yield found, after
        except warc.DAMAGE as error:
            if is_url(self.file.path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise MegalmError(
                    f"cannot read {self.file.path} at {position} ({error}): run the same command again to continue"
                ) from error
            missing = isinstance(error, OSError) and error.errno is not None
            reason = "a file that cannot be opened or read" if missing else "a file that is damaged or cut short"
            yield Malformed(self._id(position), reason, str(error)), warc.END
        self.bytes_read = self.file.size

    @abstractmethod
    def _read(self, raw: BinaryIO, start: int) -> Iterator[tuple[Found, int]]:
        """read(), of an open file; what it raises of warc.DAMAGE ends the file."""

    def _place(self) -> int:
        try:
            return self._raw.tell() - (self.file.start if self.file.stop is not None else 0) if self._raw else 0
        except (OSError, ValueError):
            return self.bytes_read

    def _id(self, position: int) -> str:
        name = f"{self.source.name}/{self.file.name}"
        return name if self.is_whole_file else f"{name}{SEPARATOR}{position}"

    def _document(self, position: int, text: str, metadata: dict[str, Any]) -> Document:
        known = {"source": self.source.name, **self.source.metadata}
        return Document(self._id(position), text, metadata | known)

    def _malformed(self, position: int, reason: str, detail: str = "", excerpt: bytes = b"") -> Malformed:
        shown = excerpt[: 4 * EXCERPT].decode("utf-8", "replace")[:EXCERPT]
        return Malformed(self._id(position), reason, detail, shown)

    def _text(self, content: bytes) -> str | Malformed:
        """The text of a file in UTF-8."""
        if b"\0" in content[:8192]:
            return self._malformed(0, "binary", "", content)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return self._malformed(0, "not UTF-8", f"at byte {error.start}", content[error.start :])


class WholeFile(Reader):
    """Files that are a document each."""

    is_whole_file = True

    def _read(self, raw: BinaryIO, start: int) -> Iterator[tuple[Found, int]]:
        if start:
            return
        content = decompressed(raw, Path(self.file.path)).read(self.largest + 1)
        if len(content) > self.largest:
            yield self._malformed(0, "too large", f"more than {self.source.largest_megabytes} MB"), 1
        elif not content.strip():
            yield self._malformed(0, "empty"), 1
        else:
            yield self._found(content), 1

    @abstractmethod
    def _found(self, content: bytes) -> Found:
        """What the content of a file is."""


class TextReader(WholeFile):
    """Plain text."""

    def _found(self, content: bytes) -> Found:
        text = self._text(content)
        return self._document(0, text, {"content_type": "text/plain"}) if isinstance(text, str) else text


class CodeReader(WholeFile):
    """A file of a program."""

    def _found(self, content: bytes) -> Found:
        text = self._text(content)
        if not isinstance(text, str):
            return text
        language = LANGUAGES.get(PurePosixPath(self.file.name).suffix.lower(), "unknown")
        return self._document(
            0, text, {"content_type": "text/plain", "path": self.file.name, "programming_language": language}
        )


class HtmlReader(WholeFile):
    """A saved page, left as HTML: metadata `content_type` says so to the step that extracts text."""

    def _found(self, content: bytes) -> Found:
        text, encoding = web.decode_page(content)
        return self._document(0, text, {"content_type": "text/html", "encoding": encoding})


class JsonlReader(Reader):
    """A JSON object per line. Its other keys become metadata, `id` and `source` as `record_id` and `origin`."""

    def _read(self, raw: BinaryIO, start: int) -> Iterator[tuple[Found, int]]:
        stream = decompressed(raw, Path(self.file.path))
        position = start
        if stream is raw:
            if start == self.file.start and start:  # in the middle of a line, which belongs to the part before
                raw.seek(start - 1)
                position += self._rest_of_line(raw) - 1
            else:
                raw.seek(start)
        else:
            warc.pass_over(stream, start)
        while self.file.stop is None or position < self.file.stop:
            line = stream.readline(self.largest + 1)
            if not line:
                return
            after = position + len(line)
            if len(line) > self.largest and not line.endswith(b"\n"):
                after += self._rest_of_line(stream)
                yield self._malformed(position, "too large", f"{after - position} bytes", line), after
            elif line.strip():
                yield self._parse(position, line), after
            position = after

    @staticmethod
    def _rest_of_line(stream: BinaryIO) -> int:
        passed = 0
        while part := stream.readline(1 << 20):
            passed += len(part)
            if part.endswith(b"\n"):
                break
        return passed

    def _parse(self, position: int, line: bytes) -> Found:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self._malformed(position, "not JSON", str(error), line)
        return self._of_record(position, record, line)

    def _of_record(self, position: int, record: Any, excerpt: bytes) -> Found:
        field = self.source.text_field
        text = record.pop(field, None) if isinstance(record, dict) else None
        if not isinstance(text, str):
            return self._malformed(position, f"no text in {field}", "", excerpt)
        if not text.strip():
            return self._malformed(position, "empty", "", excerpt)
        if any(sign in excerpt for sign in MAYBE_SURROGATE):  # also in what becomes metadata
            try:
                json.dumps([text, record], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return self._malformed(position, "not Unicode (lone surrogates)", "", excerpt)
        inner = record.pop("metadata", None)
        metadata = {**(inner if isinstance(inner, dict) else {}), **record}
        for name, kept in (("id", "record_id"), ("source", "origin")):
            if (value := metadata.pop(name, None)) is not None:
                metadata.setdefault(kept, value)
        return self._document(position, text, metadata)


class ParquetReader(JsonlReader):
    """A row of a table is a document, its other columns are metadata; read in batches, never a row group at once."""

    rows = 64

    def _read(self, raw: BinaryIO, start: int) -> Iterator[tuple[Found, int]]:
        try:
            arrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise MegalmError(f"{self.file.path} needs pyarrow: pip install 'megalm[curate]'") from None
        try:
            table = parquet.ParquetFile(raw)
        except (arrow.ArrowException, ValueError) as error:
            yield self._malformed(start, "a file that is damaged or cut short", str(error)), warc.END
            return
        if self.source.text_field not in table.schema_arrow.names:
            detail = f"its columns: {', '.join(table.schema_arrow.names)}"
            yield self._malformed(start, f"no column {self.source.text_field}", detail), warc.END
            return
        first = 0
        for group in range(table.num_row_groups):
            end = first + table.metadata.row_group(group).num_rows
            if end > start:
                position = first
                try:
                    for batch in table.iter_batches(self.rows, row_groups=[group]):
                        for record in batch.to_pylist() if position + len(batch) > start else [None] * len(batch):
                            if position >= start:
                                yield self._of_record(position, _plain(record), b""), position + 1
                            position += 1
                except (arrow.ArrowException, OSError, ValueError) as error:
                    detail = f"rows {position} to {end - 1}: {error}"
                    yield self._malformed(max(position, start), "a row group that is damaged", detail), end
            first = end


class WarcReader(Reader):
    """Pages of a crawl: the responses with status 200 that are HTML or text, left as HTML."""

    def _read(self, raw: BinaryIO, start: int) -> Iterator[tuple[Found, int]]:
        for record in warc.read_records(raw, self.file.path, start, self.largest):
            if record.content is None:
                reason = record.problem or "damaged"
                yield self._malformed(record.position, reason, "", record.excerpt), record.after
            else:
                yield self._of_warc(record, record.content), record.after

    def _of_warc(self, record: warc.WarcRecord, content: bytes) -> Found:
        kind = record.headers.get("warc-type", "").lower()
        if kind not in ("response", "resource"):
            return PassedOver(f"{kind or 'nameless'} records" if kind in KINDS else "records of another type")
        content_type = record.headers.get("content-type", "")
        body = content
        if kind == "response":
            try:
                status, headers, body = web.parse_http(content, self.largest)
            except web.NotHttp as error:
                return self._malformed(record.position, str(error), "", content)
            if status != 200:
                return PassedOver(f"responses with status {status // 100}xx")
            content_type = headers.get("content-type", "")
        media = content_type.partition(";")[0].strip().lower()
        if media in ("", "application/octet-stream") and body[:1000].lstrip().lower().startswith((b"<!doc", b"<html")):
            media = "text/html"
        if media not in ("text/html", "application/xhtml+xml", "text/plain"):
            return PassedOver("responses that are neither HTML nor text")
        if not body.strip():
            return PassedOver("responses without a body")
        text, encoding = web.decode_page(body, web.charset(content_type))
        media = "text/plain" if media == "text/plain" else "text/html"
        return self._document(record.position, text, _described(record) | {"content_type": media, "encoding": encoding})


class WetReader(WarcReader):
    """Texts of a crawl, as Common Crawl extracts them."""

    def _of_warc(self, record: warc.WarcRecord, content: bytes) -> Found:
        kind = record.headers.get("warc-type", "").lower()
        if kind != "conversion":
            return PassedOver(f"{kind or 'nameless'} records" if kind in KINDS else "records of another type")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            return self._malformed(record.position, "not UTF-8", f"at byte {error.start}", content[error.start :])
        if not text.strip():
            return self._malformed(record.position, "empty")
        return self._document(record.position, text, _described(record) | {"content_type": "text/plain"})


KINDS = {"warcinfo", "request", "metadata", "revisit", "response", "resource", "conversion", "continuation", ""}
READERS: dict[str, type[Reader]] = {
    "warc": WarcReader,
    "wet": WetReader,
    "html": HtmlReader,
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "text": TextReader,
    "code": CodeReader,
}


def open_reader(source: Source, file: File) -> Reader:
    return READERS[file.format](source, file)


def _described(record: warc.WarcRecord) -> dict[str, str]:
    names = {"warc-target-uri": "url", "warc-date": "date", "warc-identified-content-language": "declared_languages"}
    return {name: record.headers[header].strip("<>") for header, name in names.items() if header in record.headers}


def _plain(value: Any) -> Any:
    """As JSON has it: what it does not know (dates, bytes) as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, PLAIN) else str(value)
