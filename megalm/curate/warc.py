"""The records of a WARC file, from any position on; damage costs the records it lies in, not the file.

The usual .warc.gz is a gzip member per record: a position is that of a member in the file. In any other (plain, zstd,
all in one gzip member) it is that of the record in the decompressed content.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from megalm.data.corpus import decompressed

END = 2**62
"""The position behind a file whose rest cannot be read: who goes on there reads, and counts, nothing again."""

BLOCK = 1 << 16
MAGIC = b"\x1f\x8b\x08"
VERSION = b"WARC/"
LONGEST_HEADER = 1 << 16
DAMAGE = (EOFError, OSError, zlib.error, zstandard.ZstdError)
"""What reading a damaged or truncated compressed file raises."""


@dataclass(frozen=True, slots=True)
class WarcRecord:
    """headers: names in small letters. content: None where it is too large or damaged, with `problem` (a few words)."""

    position: int
    after: int
    """Where the next record is looked for."""
    headers: dict[str, str]
    content: bytes | None
    problem: str | None = None
    excerpt: bytes = b""
    """The beginning of a record that cannot be read."""


def read_records(raw: BinaryIO, path: str, start: int, largest: int) -> Iterator[WarcRecord]:
    """The records from `start` on. largest: bytes of a record that is held in memory. Raises OSError if the storage
    fails; what is damaged comes as records with a problem."""
    if path.lower().endswith(".gz") and _is_member_per_record(raw):
        return _members(raw, start, largest)
    raw.seek(0)
    return _stream(decompressed(raw, Path(path)), start, largest)


def _is_member_per_record(raw: BinaryIO) -> bool:
    """Whether the first gzip member ends where the first record does."""
    raw.seek(0)
    decompressor = zlib.decompressobj(31)
    length: int | None = None
    size = 0
    beginning = b""
    try:
        while not decompressor.eof:
            block = decompressor.unconsumed_tail or raw.read(BLOCK)
            if not block:
                return True  # cut short in its first record
            content = decompressor.decompress(block, BLOCK)
            size += len(content)
            if length is None:
                beginning += content
                head, gap, _ = _split(beginning)
                if gap:
                    length = len(head) + len(gap) + _length(_headers(head))
                elif len(beginning) > LONGEST_HEADER:
                    return True
            if length is not None and size > length + 16:
                return False
    except (zlib.error, ValueError):
        return True
    return True


def _members(raw: BinaryIO, start: int, largest: int) -> Iterator[WarcRecord]:
    raw.seek(start)
    position, pending = start, b""
    while True:
        pending = pending or raw.read(BLOCK)
        if not pending:
            return
        decompressor = zlib.decompressobj(31)
        parts: list[bytes] = []
        size, consumed = 0, 0
        problem = None
        try:
            while not decompressor.eof:
                block = decompressor.unconsumed_tail or pending or raw.read(BLOCK)
                if block is pending:
                    pending = b""
                if not block:
                    problem = "cut short"
                    break
                content = decompressor.decompress(block, BLOCK)
                # At the end of a member, unconsumed_tail may hold what unused_data holds too.
                left = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
                consumed += len(block) - len(left)
                size += len(content)
                if size <= largest + LONGEST_HEADER:
                    parts.append(content)
        except zlib.error:
            problem = "damaged"
        if problem is None:
            pending = decompressor.unused_data
            after = position + consumed
            yield _record(position, after, b"".join(parts), size, largest)
        else:
            after, pending = _next_member(raw, position + 1)
            yield WarcRecord(position, after, {}, None, f"{problem} gzip member", b"".join(parts)[:1000])
        position = after


def _next_member(raw: BinaryIO, start: int) -> tuple[int, bytes]:
    """Where the next record's gzip member begins, at or after `start`, and some bytes from there; (end, b"") if there
    is none."""
    raw.seek(start)
    window, offset = b"", start
    while block := raw.read(BLOCK):
        window += block
        found = window.find(MAGIC)
        while found >= 0:
            candidate = window[found : found + 2048]
            if len(candidate) < 2048 and len(block) == BLOCK:
                break  # look again when more of it is there
            try:
                if zlib.decompressobj(31).decompress(candidate, 5).startswith(VERSION):
                    raw.seek(offset + found)
                    return offset + found, raw.read(BLOCK)
            except zlib.error:
                pass
            found = window.find(MAGIC, found + 1)
        keep = min(len(window), len(window) - found if found >= 0 else 2)
        offset += len(window) - keep
        window = window[len(window) - keep :]
    return offset + len(window), b""


def _record(position: int, after: int, member: bytes, size: int, largest: int) -> WarcRecord:
    """The one record of a decompressed member of `size` bytes, of which `member` holds what fits into memory."""
    if size > largest + LONGEST_HEADER:
        return WarcRecord(position, after, {}, None, "too large", f"{size} bytes".encode())
    head, gap, rest = _split(member.lstrip(b"\r\n"))
    if not head.startswith(VERSION) or not gap:
        return WarcRecord(position, after, {}, None, "no WARC record", member[:1000])
    headers = _headers(head)
    try:
        length = _length(headers)
    except ValueError:
        return WarcRecord(position, after, headers, None, "no content length", member[:1000])
    if length > largest:
        return WarcRecord(position, after, headers, None, "too large", f"{length} bytes".encode())
    if len(rest) < length:
        return WarcRecord(position, after, headers, None, "shorter than its content length", member[:1000])
    return WarcRecord(position, after, headers, rest[:length])


def _stream(stream: BinaryIO, start: int, largest: int) -> Iterator[WarcRecord]:
    """Records one behind the other in decompressed content."""
    position = 0
    try:
        position += pass_over(stream, start)
        line = b""
        while True:
            line = line or stream.readline(LONGEST_HEADER)
            if not line:
                return
            if not line.strip():
                position += len(line)
                line = b""
                continue
            begin, lost = position, b""
            while line and not line.startswith(VERSION):
                lost += line if len(lost) < 1000 else b""
                position += len(line)
                line = stream.readline(LONGEST_HEADER)
            if lost:
                yield WarcRecord(begin, position, {}, None, "no WARC record", lost[:1000])
                continue
            head = line
            while len(head) < LONGEST_HEADER:
                line = stream.readline(LONGEST_HEADER)
                head += line
                if not line.strip():
                    break
            position += len(head)
            line = b""
            headers = _headers(head)
            try:
                length = _length(headers)
            except ValueError:
                yield WarcRecord(begin, position, headers, None, "no content length", head[:1000])
                continue
            if length > largest:
                skipped = pass_over(stream, length)
                position += skipped
                yield WarcRecord(begin, position, headers, None, "too large", f"{length} bytes".encode())
                continue
            content = stream.read(length)
            position += len(content)
            if len(content) < length:
                yield WarcRecord(begin, position, headers, None, "cut short", content[:1000])
                return
            yield WarcRecord(begin, position, headers, content)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield WarcRecord(position, END, {}, None, "damaged or cut short", str(error).encode())


def pass_over(stream: BinaryIO, count: int) -> int:
    """Read `count` bytes, or up to the end; how many there were."""
    passed = 0
    while passed < count and (block := stream.read(min(count - passed, 1 << 20))):
        passed += len(block)
    return passed


def _split(content: bytes) -> tuple[bytes, bytes, bytes]:
    match = re.search(rb"\r?\n\r?\n", content[:LONGEST_HEADER])
    if match is None:
        return content, b"", b""
    return content[: match.start()], match[0], content[match.end() :]


def _headers(head: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return headers


def _length(headers: dict[str, str]) -> int:
    length = int(headers.get("content-length", ""))
    if length < 0:
        raise ValueError
    return length
