"""Every format is read from any position on, and what is broken is put aside."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megalm.curate import web
from megalm.curate.document import Document
from megalm.curate.readers import Malformed, PassedOver, open_reader
from megalm.curate.recipe import Source
from megalm.curate.sources import File, list_files
from megalm.errors import MegalmError

PAGE = "<html><head><meta charset='gbk'></head><body>中文网页</body></html>"


def source(path: Path | str, **settings: Any) -> Source:
    return Source(name="s", path=str(path), **settings)


def read(path: Path | str, start: int | None = None, part: dict[str, Any] | None = None, **settings: Any) -> list[Any]:
    """(what was found, position behind it) of the only file of a source."""
    given = source(path, **settings)
    (file,), _ = list_files(given, "sources.0")
    if part:
        file = File(**{name: getattr(file, name) for name in File.__slots__} | part)
    return list(open_reader(given, file).read(start))


def documents(found: list[Any]) -> list[Document]:
    return [each for each, _ in found if isinstance(each, Document)]


def reasons(found: list[Any]) -> list[str]:
    return [each.reason for each, _ in found if isinstance(each, Malformed)]


def assert_resumes(path: Path | str, **settings: Any) -> None:
    """From every position that a reader tells, the rest comes as it did."""
    whole = read(path, **settings)
    assert whole
    for number, (_, position) in enumerate(whole[:-1]):
        rest = read(path, position, **settings)
        assert rest == whole[number + 1 :], position


# ---- JSONL ----

LINES = [
    json.dumps(
        {"text": "first 第一", "id": 7, "source": "books", "group": "g", "position": 1, "self": 2}, ensure_ascii=False
    ),
    "{broken",
    json.dumps({"text": "second \U0001f600", "metadata": {"url": "http://x/"}}),
    json.dumps({"content": "no text"}),
    "[1, 2]",
    json.dumps({"text": "  "}),
    '{"text": "\\ud800"}',
    '{"text": "good", "title": "\\uDC00"}',
    "",
    json.dumps({"text": "last"}),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    content = "\n".join(LINES).encode()
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(compress(content))
    found = read(path)
    texts = documents(found)
    assert [each.text for each in texts] == ["first 第一", "second \U0001f600", "last"]
    assert [each.id for each in texts] == [
        "s/x.jsonl" + suffix + f"@{content.index(line.encode())}" for line in (LINES[0], LINES[2], LINES[9])
    ]
    assert texts[0].metadata == {
        "group": "g",
        "record_id": 7,
        "origin": "books",
        "source": "s",
        "position": 1,
        "self": 2,  # names of arguments, elsewhere
    }
    assert texts[1].metadata == {"url": "http://x/", "source": "s"}
    assert reasons(found) == [
        "not JSON",
        "no text in text",
        "no text in text",
        "empty",
        *["not Unicode (lone surrogates)"] * 2,
    ]
    assert_resumes(path)


def test_jsonl_parts_share_all_lines_wherever_they_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * (number % 5 + 1)}) + "\n" for number in range(12)))
    whole = read(path)
    for cut in range(1, path.stat().st_size):
        first = read(path, part={"stop": cut})
        assert first + read(path, part={"start": cut}) == whole, cut
        assert first + read(path, whole[len(first) - 1][1] if first else cut, part={"start": cut}) == whole


def test_a_line_that_is_too_large_is_passed_by(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "x" * 2**20}) + "\n" + json.dumps({"text": "small"}) + "\n")
    found = read(path, largest_megabytes=1)
    assert reasons(found) == ["too large"] and [each.text for each in documents(found)] == ["small"]
    assert_resumes(path, largest_megabytes=1)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    content = "".join(json.dumps({"text": os.urandom(200).hex()}) + "\n" for _ in range(2000)).encode()
    compressed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path.write_bytes(compressed[: len(compressed) * 2 // 3])
    found = read(path)
    assert len(documents(found)) > 100
    assert reasons(found) == ["a file that is damaged or cut short"]
    given = source(path)
    (file,), _ = list_files(given, "sources.0")
    *_, (_, behind) = open_reader(given, file).read()
    assert list(open_reader(given, file).read(behind)) == [], "a run that goes on there does not count it again"


def test_a_file_that_cannot_be_read_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n")
    given = source(path)
    (file,), _ = list_files(given, "sources.0")
    path.unlink()
    path.mkdir()  # opening fails for the superuser too
    assert reasons(list(open_reader(given, file).read())) == ["a file that cannot be opened or read"]


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    (raw / "a").mkdir(parents=True)
    elsewhere.mkdir()
    (raw / "a" / "x.jsonl").write_text("{}\n")
    (elsewhere / "y.jsonl").write_text("{}\n")
    (raw / "linked").symlink_to(elsewhere)
    (raw / "linked_again").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(raw)
    (raw / "broken.jsonl").symlink_to(raw / "nothing")
    files, left_out = list_files(source(raw), "sources.0")
    assert [Path(file.path).relative_to(raw).as_posix() for file in files] == ["a/x.jsonl", "linked/y.jsonl"]
    assert left_out == {"links to folders already read": 2, "broken links and no regular files": 1}


def test_urls(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("two")
    (tmp_path / "deep" / "c.bin").write_text("three")
    files, left_out = list_files(source(f"file://{tmp_path}"), "sources.0")
    assert [file.name for file in files] == ["a.jsonl", "deep/b.txt"] and left_out.total() == 1
    assert [file.name for file in list_files(source(tmp_path), "")[0]] == [file.name for file in files]
    assert [each.text for each in documents(read(f"file://{tmp_path}/*.jsonl"))] == ["one"]
    with pytest.raises(MegalmError, match="names no file"):
        list_files(source(f"file://{tmp_path}/none/*.jsonl"), "sources.0")
    with pytest.raises(MegalmError, match="fsspec knows no nonsense"):
        list_files(source("nonsense://x"), "sources.0")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.xyz").write_text("x")
    with pytest.raises(MegalmError, match="sources.3: the format of"):
        list_files(source(tmp_path / "x.xyz"), "sources.3")
    assert documents(read(tmp_path / "x.xyz", format="text"))


# ---- whole files ----


def test_text_code_and_html(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "c.txt").write_bytes(b"\0\1\2")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "e.html.gz").write_bytes(gzip.compress(PAGE.encode("gbk")))
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "x.py").write_text("1\n")
    (tmp_path / "m.py").write_text("print(1)\n")
    assert documents(read(tmp_path / "a.txt"))[0] == Document(
        "s/a.txt", "hello", {"content_type": "text/plain", "source": "s"}
    )
    assert [reasons(read(tmp_path / f"{name}.txt"))[0] for name in "bcd"] == ["not UTF-8", "binary", "empty"]
    page = documents(read(tmp_path / "e.html.gz"))[0]
    assert page.text == PAGE and page.metadata["encoding"] == "gb18030" and page.metadata["content_type"] == "text/html"
    code = documents(read(tmp_path, format="code"))
    assert [each.metadata["programming_language"] for each in code] == ["python"]


def test_encodings_of_pages() -> None:
    text = "<p>价格：一百元，数据质量。</p>" * 20
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert web.decode_page(text.encode(encoding)) == (text, encoding.removesuffix("-sig"))
    assert web.decode_page(text.encode(), "no-such-charset") == (text, "utf-8")
    declared = f"<meta charset=iso-8859-1>{text}"
    for header in ("iso-8859-1", "gb2312", "utf-16", None):
        assert web.decode_page(declared.encode(), header) == (declared, "utf-8"), "what is UTF-8 is UTF-8"
    assert web.decode_page("café".encode("cp1252"), "iso-8859-1") == ("café", "cp1252")
    assert web.decode_page("“Größe” – 5 €".encode("cp1252"), "latin1") == ("“Größe” – 5 €", "cp1252")
    for own in ("", "<meta charset=utf-8>", "<meta content='text/html; charset=gb2312'>"):
        for header in ("gb2312", "GBK", "utf-8", None):
            assert web.decode_page((own + text).encode("gbk"), header) == (own + text, "gb18030"), (own, header)
    big5 = '<?xml version="1.0" encoding="big5"?>' + "繁體中文" * 9
    assert web.decode_page(big5.encode("big5")) == (big5, "big5hkscs")
    assert web.decode_page(text.encode("big5hkscs", "ignore"))[1].startswith("big5"), "declared nowhere"
    for encoding in ("iso-2022-jp", "utf-16-le"):
        assert web.decode_page("日本語 and more".encode(encoding), encoding)[0] == "日本語 and more"


def test_pages_that_are_broken_keep_their_encoding() -> None:
    text = "<p>价格：一百元，数据质量。</p>" * 20
    for header in ("utf-8", "iso-8859-1", None):
        assert web.decode_page(text.encode()[:-8], header) == (text[:-6] + "\ufffd", "utf-8"), "cut in a character"
    spoiled, encoding = web.decode_page(text.encode("gbk")[:300] + b"\xff\xff" + text.encode("gbk")[300:], "gbk")
    assert encoding == "gb18030" and spoiled.replace("\ufffd", "") == text
    for content in (bytes(range(256)), b"\xff" * 50, b"", b"\x81\x8d", "日本語です。".encode("shift_jis")):
        assert isinstance(web.decode_page(content, "no-such-encoding")[0], str), "never fails"
    for never in ("undefined", "idna", "unicode_escape", "raw-unicode-escape", "punycode", "utf-7", "rot13"):
        page = f"<meta charset={never}>{text}".encode("gbk")
        assert text in web.decode_page(page, never)[0], "what no page is in"


def test_http_bodies() -> None:
    page = b"<p>" + b"text " * 100 + b"</p>"
    raw_deflate = zlib.compressobj(wbits=-15)
    bodies = {
        "gzip": [gzip.compress(page), page],  # many crawlers decode the body and keep the header
        "deflate": [zlib.compress(page), raw_deflate.compress(page) + raw_deflate.flush()],
        "identity": [page],
    }
    for coding, sent in bodies.items():
        for body in sent:
            message = b"HTTP/1.1 200 OK\r\nContent-Encoding: " + coding.encode() + b"\r\n\r\n" + body
            assert web.parse_http(message, 10**6)[2] == page, coding
    brotli = pytest.importorskip("brotli")
    message = b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\n" + brotli.compress(page)
    assert web.parse_http(message, 10**6)[2] == page
    with pytest.raises(web.NotHttp, match="too large"):
        web.parse_http(b"HTTP/1.1 200 OK\nContent-Encoding: br\n\n" + brotli.compress(bytes(2 * 10**6)), 10**6)
    plain = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n<p>not chunked</p>"
    assert web.parse_http(plain, 10**6)[2] == b"<p>not chunked</p>"
    for body, reason in [(gzip.compress(bytes(2 * 10**6)), "too large"), (b"\x1f\x8bxx", "does not decompress")]:
        with pytest.raises(web.NotHttp, match=reason):
            web.parse_http(b"HTTP/1.1 200 OK\nContent-Encoding: gzip\n\n" + body, 10**6)
    with pytest.raises(web.NotHttp, match="unknown content encoding"):
        web.parse_http(b"HTTP/1.1 200 OK\nContent-Encoding: zoo\n\nx", 10**6)


# ---- Parquet ----


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"row {number}" if number != 5 else None, "score": number / 2} for number in range(150)]
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=70)
    found = read(path)
    assert len(documents(found)) == 149 and reasons(found) == ["no text in text"]
    assert documents(found)[7].id == "s/x.parquet@8" and documents(found)[7].metadata == {"score": 4.0, "source": "s"}
    for start in (3, 70, 71, 149):
        assert read(path, start) == found[start:]
    assert reasons(read(path, text_field="body")) == ["no column body"]
    path.write_bytes(path.read_bytes()[:-10])
    assert reasons(read(path)) == ["a file that is damaged or cut short"]


# ---- WARC ----


def record(kind: str, content: bytes, **headers: str) -> bytes:
    named = {"WARC-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"WARC/1.0\r\n{lines}Content-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"


def response(body: bytes, status: int = 200, **headers: str) -> bytes:
    named = {"Content_Type": "text/html"} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body


def crawl() -> Iterator[bytes]:
    yield record("warcinfo", b"software: none")
    yield record("request", b"GET / HTTP/1.1")
    yield record("response", response(b"<p>one</p>"), WARC_Target_URI="http://a/", WARC_Date="2026-01-01T00:00:00Z")
    yield record("response", response(b"gone", 404))
    yield record("response", response(b"%PDF", Content_Type="application/pdf"))
    yield record("response", b"no http at all")
    yield record("response", response(gzip.compress(b"<p>zipped</p>"), Content_Encoding="gzip"))
    chunked = b"5\r\n<p>ch\r\n9;x=y\r\nunked</p>\r\n0\r\n\r\n"
    yield record("response", response(chunked, Transfer_Encoding="chunked"))
    yield record("response", response(PAGE.encode("gbk"), Content_Type="text/html; charset=gb2312"))
    yield record("response", response(b"plain", Content_Type="text/plain"))
    yield record("response", response(b"<p>" + b"x" * 2**20 + b"</p>"))
    yield record("response", response(b"<p>last</p>"))


TEXTS = ["<p>one</p>", "<p>zipped</p>", "<p>chunked</p>", PAGE, "plain", "<p>last</p>"]


@pytest.mark.parametrize("packing", ["members", "plain", "one member", "zst"])
def test_warc(tmp_path: Path, packing: str) -> None:
    records = list(crawl())
    suffix, content = {
        "members": (".gz", b"".join(map(gzip.compress, records))),
        "plain": ("", b"".join(records)),
        "one member": (".gz", gzip.compress(b"".join(records))),
        "zst": (".zst", zstandard.compress(b"".join(records))),
    }[packing]
    path = tmp_path / f"x.warc{suffix}"
    path.write_bytes(content)
    found = read(path, largest_megabytes=1)
    texts = documents(found)
    assert [each.text for each in texts] == TEXTS
    assert texts[0].metadata["url"] == "http://a/" and texts[0].metadata["date"] == "2026-01-01T00:00:00Z"
    assert texts[3].metadata["encoding"] == "gb18030" and texts[4].metadata["content_type"] == "text/plain"
    assert reasons(found) == ["no HTTP response", "too large"]
    assert sorted(each.reason for each, _ in found if isinstance(each, PassedOver)) == [
        "request records",
        "responses that are neither HTML nor text",
        "responses with status 4xx",
        "warcinfo records",
    ]
    assert len({each.id for each in texts}) == len(texts)
    assert_resumes(path, largest_megabytes=1)


def test_a_damaged_warc_costs_the_records_it_lies_in(tmp_path: Path) -> None:
    members = [gzip.compress(record("response", response(f"<p>page {number}</p>".encode()))) for number in range(6)]
    members[2] = members[2][:20] + bytes(40) + members[2][60:]  # damaged
    members[4] = members[4][:-9]  # its end is missing
    path = tmp_path / "x.warc.gz"
    path.write_bytes(b"".join(members)[:-12])  # and the file is cut short
    found = read(path)
    assert [each.text for each in documents(found)] == [f"<p>page {number}</p>" for number in (0, 1, 3)]
    assert len(reasons(found)) == 3 and "cut short gzip member" in reasons(found)
    assert_resumes(path)

    path = tmp_path / "x.warc"
    records = [record("response", response(b"<p>a</p>")), b"rubbish\r\n", record("response", response(b"<p>b</p>"))]
    path.write_bytes(b"".join(records) + records[0][:30])
    found = read(path)
    assert [each.text for each in documents(found)] == ["<p>a</p>", "<p>b</p>"]
    assert reasons(found) == ["no WARC record", "no content length"]
    assert_resumes(path)


def test_a_warc_of_another_library(tmp_path: Path) -> None:
    warcio = pytest.importorskip("warcio")
    statusandheaders = pytest.importorskip("warcio.statusandheaders")
    path = tmp_path / "x.warc.gz"
    with path.open("wb") as stream:
        writer = warcio.WARCWriter(stream, gzip=True)
        for number in range(3):
            headers = statusandheaders.StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            page = io.BytesIO(f"<p>{number}</p>".encode())
            writer.write_record(
                writer.create_warc_record(f"http://x/{number}", "response", payload=page, http_headers=headers)
            )
    assert [(each.text, each.metadata["url"]) for each in documents(read(path))] == [
        (f"<p>{number}</p>", f"http://x/{number}") for number in range(3)
    ]
    assert_resumes(path)


def test_wet(tmp_path: Path) -> None:
    path = tmp_path / "x.warc.wet.gz"
    records = [
        record("warcinfo", b"x"),
        record("conversion", "网页的文字".encode(), WARC_Target_URI="http://a/"),
        record("conversion", b"\xff\xff"),
    ]
    path.write_bytes(b"".join(map(gzip.compress, records)))
    found = read(path)
    assert [each.text for each in documents(found)] == ["网页的文字"] and reasons(found) == ["not UTF-8"]
    assert_resumes(path)


def test_files_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "b/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"text": "same"}\n')
    (tmp_path / "a" / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "same"}\n'))
    given = Source(name="s", path=str(tmp_path))
    files, _ = list_files(given, "sources.0")
    ids = [found.id for file in files for found in documents(list(open_reader(given, file).read()))]
    assert ids == ["s/a/x.jsonl@0", "s/a/x.jsonl.gz@0", "s/b/x.jsonl@0"]


def test_one_file_under_several_spellings_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*paths: str) -> list[str]:
        return [file.name for file in list_files(Source(name="s", path=[*paths]), "sources.0")[0]]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/x.jsonl", "b/x.jsonl"):
        (tmp_path / name).write_text('{"text": "same"}\n')
    monkeypatch.chdir(tmp_path)
    absolute = tmp_path / "a" / "x.jsonl"
    assert names("a/x.jsonl", str(absolute), "b/../a//x.jsonl", f"file://{absolute}", "a/*.jsonl") == ["x.jsonl"]
    # And the same on every machine, however some paths are written.
    assert names("a/x.jsonl", str(tmp_path / "b")) == names("a", "b") == ["a/x.jsonl", "b/x.jsonl"]
    with pytest.raises(MegalmError, match="sources.0.path c names no file"):
        names("a", "c")


def test_names_of_remote_files_keep_what_tells_them_apart() -> None:
    from megalm.curate.sources import _names

    assert _names(["s3://b/a//x", "s3://b/a/x"]) == ["/x", "x"]
    assert _names(["s3://b/x", "s3://c/x"]) == ["b/x", "c/x"]
    assert _names(["/d/in/x", "s3://b/x", "/d/in/y"]) == ["x", "s3://x", "y"]
    assert _names(["http://h/get?of=http://g/x", "http://h/y"]) == ["get?of=http://g/x", "y"]
