"""Real text that any machine with Python has: the documentation and sources of the installation itself."""

import ast
import importlib
import importlib.machinery
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from megalm.data.corpus import MAX_CHARACTERS, Document, Tally, split_text
from megalm.errors import MegalmError

PARTS = ("topics", "docstrings", "sources", "packages")
"""`topics`: what Python's help() says about the language. `docstrings`: reference pages of the standard library.
`sources`: its files. `packages`: reference pages of the installed packages."""
DEFAULT_PARTS = ("topics", "docstrings", "sources")
SMALLEST_PAGE = 200
"""Characters below which a reference page says next to nothing."""


def gather_python(tally: Tally, parts: Sequence[str] = DEFAULT_PARTS) -> Iterator[Document]:
    """Documents of the running Python installation, in a fixed order.

    A reference page is one document per module: its docstring, then the name, signature and docstring of every public
    class and function, as prose without code. The page, the source and the parts they are cut into form a group, since
    their docstrings are the same. Test suites are left out. No package is imported except the standard library's
    modules written in C, which have no source to read.
    """
    for part in parts:
        if part not in PARTS:
            raise MegalmError(f"there is no part {part!r} of a Python installation: choose from {', '.join(PARTS)}")
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    if "topics" in parts:
        yield from _topics(tally)
    if "docstrings" in parts:
        yield from _c_module_pages(tally)
        yield from _pages(library, "python", tally)
    if "packages" in parts:
        for folder in sorted({paths["purelib"], paths["platlib"]}):
            yield from _pages(Path(folder), "packages", tally)
    if "sources" in parts:
        for path in _python_files(library):
            text = _source(path, tally)
            if text is not None:
                group = _group("python", _module_name(path, library))
                for piece in split_text(text, MAX_CHARACTERS):
                    yield Document(piece, f"python/{path.relative_to(library)}", group)


def docstrings() -> Iterator[tuple[str, str, str]]:
    """(module, heading, docstring) of every public class and function of the standard library's Python files, in a
    fixed order. A heading is the full name, with the arguments of a function."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _python_files(library):
        name = _module_name(path, library)
        tree = _parsed(path, Tally())
        for heading, docstring in _entries(tree, name) if tree else ():
            if docstring and heading != name:
                yield name, heading, docstring


def _topics(tally: Tally) -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        tally.skipped["documentation topics (not in this Python)"] += 1
        return
    for name in sorted(topics):
        yield Document(topics[name], f"python/topics/{name}")


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not _left_out(name))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py") and not _left_out(name))


def _left_out(name: str) -> bool:
    """pydoc_data is the topics once more."""
    return name.startswith("test_") or name in (
        *("__pycache__", "site-packages", "dist-packages", "pydoc_data"),
        *("tests", "test", "idle_test", "testing"),
    )


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _group(prefix: str, module: str) -> str:
    """One for a module and its twin in the other language (_pydecimal and decimal document the same), and one for the
    tables of character sets, which differ in a few lines."""
    if module.startswith("encodings."):
        module = "encodings"
    return f"{prefix}/{module.removeprefix('_py').lstrip('_')}"


def _source(path: Path, tally: Tally) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        tally.skipped["unreadable or not UTF-8"] += 1
        return None
    if not text.strip():
        tally.skipped["empty"] += 1
        return None
    return text


def _pages(root: Path, prefix: str, tally: Tally) -> Iterator[Document]:
    """Reference pages of the Python files below a folder."""
    for path in _python_files(root):
        tree = _parsed(path, tally)
        if tree is not None:
            name = _module_name(path, root)
            yield from _page(name, list(_entries(tree, name)), prefix, tally)


def _parsed(path: Path, tally: Tally) -> ast.Module | None:
    text = _source(path, tally)
    if text is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        tally.skipped["Python files that do not parse"] += 1
        return None


def _entries(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module or class and of what it holds in public, depth first."""
    heading = name
    yield heading, ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _entries(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"{name}.{child.name}({ast.unparse(child.args)})", docstring


def _c_module_pages(tally: Tally) -> Iterator[Document]:
    """Reference pages of the standard library's modules without Python source."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") and name != "_thread" or name in ("antigravity", "this", "idlelib", "test"):
            continue
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec is not None and not (spec.origin or "").endswith((".so", ".pyd")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # modules about to be removed
                module = importlib.import_module(name)
        except ImportError:
            tally.skipped["modules of another platform"] += 1
            continue
        if name not in sys.builtin_module_names and spec is None:
            continue  # frozen: its source is read with the others
        yield from _page(name, list(_c_entries(module)), "python", tally)


def _c_entries(module: ModuleType) -> Iterator[tuple[str, str]]:
    yield module.__name__, inspect.getdoc(module) or ""
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not callable(member) or getattr(member, "__module__", None) != module.__name__:
            continue
        yield f"{module.__name__}.{name}{_signature(member)}", inspect.getdoc(member) or ""
        if inspect.isclass(member):
            for method_name, method in sorted(vars(member).items()):
                if not method_name.startswith("_") and callable(method) and getattr(method, "__doc__", None):
                    heading = f"{module.__name__}.{name}.{method_name}{_signature(method)}"
                    yield heading, inspect.cleandoc(str(method.__doc__))


def _signature(member: object) -> str:
    try:
        return str(inspect.signature(member))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return ""


def _page(name: str, entries: list[tuple[str, str]], prefix: str, tally: Tally) -> Iterator[Document]:
    text = "\n\n".join(f"{heading}\n\n{docstring.strip()}" for heading, docstring in entries if docstring.strip())
    if len(text) < SMALLEST_PAGE:
        tally.skipped["modules that document next to nothing"] += 1
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        tally.skipped["not Unicode (lone surrogates)"] += 1
        return
    for piece in split_text(text + "\n", MAX_CHARACTERS):
        yield Document(piece, f"{prefix}/reference/{name}", _group(prefix, name))
