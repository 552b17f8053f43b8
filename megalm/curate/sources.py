"""Which files a source is: local paths and fsspec URLs, folders and patterns."""

import glob
import importlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from megalm.curate.recipe import Source
from megalm.data.corpus import walk
from megalm.errors import MegalmError

COMPRESSIONS = (".gz", ".zst")
SUFFIXES = {
    "warc": (".warc",),
    "wet": (".wet",),
    "html": (".html", ".htm", ".xhtml"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md", ".rst"),
}
"""Format -> its files, each with or without the suffix of a compression."""
LANGUAGES = {
    ".py": "python",
    ".pyi": "python",
    ".ipynb": "jupyter",
    ".r": "r",
    ".jl": "julia",
    ".m": "matlab",
    ".c": "c",
    ".h": "c",
    ".cc": "c++",
    ".cpp": "c++",
    ".cxx": "c++",
    ".hpp": "c++",
    ".cu": "cuda",
    ".cuh": "cuda",
    ".java": "java",
    ".kt": "kotlin",
    ".scala": "scala",
    ".cs": "c#",
    ".go": "go",
    ".rs": "rust",
    ".swift": "swift",
    ".js": "javascript",
    ".mjs": "javascript",
    ".jsx": "javascript",
    ".ts": "typescript",
    ".tsx": "typescript",
    ".rb": "ruby",
    ".php": "php",
    ".pl": "perl",
    ".lua": "lua",
    ".hs": "haskell",
    ".ml": "ocaml",
    ".ex": "elixir",
    ".sh": "shell",
    ".bash": "shell",
    ".sql": "sql",
    ".v": "verilog",
    ".sv": "verilog",
    ".vhd": "vhdl",
    ".html": "html",
    ".css": "css",
    ".tex": "tex",
    ".md": "markdown",
    ".rst": "rst",
    ".cmake": "cmake",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".proto": "protobuf",
    ".f90": "fortran",
    ".dart": "dart",
}
"""Of code: extension -> metadata `programming_language`."""
NO_SOURCES = {".git", ".hg", ".svn", "node_modules", "__pycache__", "site-packages", ".venv", "venv"}
"""Folders of a code tree that hold what others wrote, or no text."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source, or a part of it. name: unique in the source, the same on every machine."""

    path: str
    name: str
    format: str
    size: int
    modified: str = ""
    """What changes with the content: the time in nanoseconds of a local file, a tag or time of a remote one; empty
    where the storage tells none."""
    start: int = 0
    """Of the part, in the reader's positions."""
    stop: int | None = None
    """Where the part ends: what begins before is read. None: at the end of the file."""


def is_url(path: str) -> bool:
    return "://" in path


def open_binary(path: str) -> BinaryIO:
    """Open a local path or a URL. Raises OSError."""
    if not is_url(path):
        return open(path, "rb")
    return _file_system(path).open(path, "rb")


def list_files(source: Source, key: str) -> tuple[list[File], Counter[str]]:
    """The files of a source, sorted by name, and what of its folders was left out, by reason.

    key: of the source in the recipe, for messages. Raises MegalmError for a path without a file, and for files of no
    known format.
    """
    left_out: Counter[str] = Counter()
    found: dict[str, tuple[str, int, str]] = {}
    for path in [source.path] if isinstance(source.path, str) else source.path:
        each = list(_find(path, source, left_out))
        if not each:
            more = f" ({dict(left_out)})" if left_out else ""
            raise MegalmError(f"{key}.path {path} names no file that can be read{more}: correct the path or the format")
        for spelled, size, modified in each:
            found.setdefault(_absolute(spelled), (spelled, size, modified))
    files = []
    for name, (path, size, modified) in zip(_names(found), found.values()):
        kind = source.format if source.format != "auto" else format_of(path)
        if kind is None:
            raise MegalmError(f"{key}: the format of {path} is not known by its name: give the source a format")
        files.append(File(path, name, kind, size, modified))
    return sorted(files, key=lambda file: file.name), left_out


def format_of(path: str) -> str | None:
    """The format that a file's name tells, or None. A .warc.wet.gz, as Common Crawl has them, is WET."""
    suffix = _suffix(path)
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def _suffix(path: str) -> str:
    """The extension below the one of a compression."""
    pure = PurePosixPath(path.lower())
    return PurePosixPath(pure.stem).suffix if pure.suffix in COMPRESSIONS else pure.suffix


def _find(path: str, source: Source, left_out: Counter[str]) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, File.modified) of the files that `path` names. A file that is named itself is taken whatever its
    extension."""
    if is_url(path):
        system = _file_system(path)
        matches = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        for match in matches:
            whole = system.unstrip_protocol(match)
            if system.isdir(match):
                details = system.find(match, detail=True)
                for inner, about in sorted(details.items()):
                    if _wanted(inner, source, left_out):
                        yield system.unstrip_protocol(inner), *_told(about)
            elif system.exists(match):
                yield whole, *_told(system.info(match))
        return
    for match in sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]:
        if os.path.isdir(match):
            for inner in walk(match, left_out, NO_SOURCES if source.format == "code" else ()):
                if not os.path.isfile(inner):
                    left_out["broken links and no regular files"] += 1
                elif _wanted(inner, source, left_out):
                    yield inner, *_stated(inner)
        elif os.path.exists(match):
            yield match, *_stated(match)


def _stated(path: str) -> tuple[int, str]:
    about = os.stat(path)
    return about.st_size, str(about.st_mtime_ns)


_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified", "updated")


def _told(about: Mapping[str, Any]) -> tuple[int, str]:
    """Of what a remote storage says: each calls its tags and times by names of its own."""
    return int(about.get("size") or 0), next((str(about[tag]) for tag in _TAGS if about.get(tag)), "")


def _wanted(path: str, source: Source, left_out: Counter[str]) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        left_out["files whose names are not Unicode"] += 1
        return False
    if source.extensions is not None:
        good = path.lower().endswith(tuple(source.extensions))
    elif source.format == "code":
        good = PurePosixPath(path).suffix.lower() in LANGUAGES
    elif source.format == "auto":
        good = format_of(path) is not None
    else:
        good = _suffix(path) in SUFFIXES[source.format]
    if not good:
        left_out["files of another extension"] += 1
    return good


def _absolute(path: str) -> str:
    """By which a file is known: under two spellings of its path it would be twice there. Links are two files."""
    path = path.removeprefix("file://")
    return path if is_url(path) else os.path.abspath(path)


def _names(paths: Iterable[str]) -> list[str]:
    """Each absolute path below the deepest folder that holds all of its protocol, so that no two are the same; where
    there are several protocols, with its own."""
    parted = [path.partition("://") if is_url(path) else ("", "", path) for path in paths]
    folders: dict[str, list[str]] = {}
    for protocol, _, path in parted:
        folders.setdefault(protocol, []).append(path[: path.rfind("/") + 1])
    shared = {protocol: os.path.commonprefix(each).rfind("/") + 1 for protocol, each in folders.items()}
    return [(protocol + mark if len(shared) > 1 else "") + path[shared[protocol] :] for protocol, mark, path in parted]


def _file_system(path: str) -> Any:
    protocol = path.partition("://")[0]
    try:
        return importlib.import_module("fsspec").filesystem(protocol)
    except ImportError as error:
        raise MegalmError(f"{path} needs a package that is not installed ({error}): pip install it") from None
    except ValueError:
        raise MegalmError(f"fsspec knows no {protocol}:// as in {path}: correct the URL") from None
