"""Strict, typed, frozen configuration: read YAML, layer it, override it, validate it, print it and describe it.

A file names only what differs from the defaults. `extends:` names one file or a list of files (relative to the file
that says so) to start from; later ones win, the file itself wins over all of them. Mappings merge deeply; lists and
scalars replace. A file that is reached twice counts once, where it is reached first: of two files that extend the same
base, the second does not bring the base's values back over the first. Imports nothing that takes seconds.
"""

import difflib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.errors import MegalmError

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML without libyaml: ten times slower, otherwise the same
    from yaml import SafeLoader  # type: ignore[assignment]


class Config(BaseModel):
    """A branch of the tree: unknown keys and wrong types are errors, numbers are finite, values do not change, fields
    are documented."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load(
    path: str,
    root: type[AnyConfig],
    overrides: Sequence[str] = (),
    *,
    called: str = "config file",
    option: str = "--set",
) -> AnyConfig:
    """The config in the YAML file `path` and what it extends, changed by `overrides` ("dotted.key=YAML value").

    called, option: what the user knows the file and an override by. Raises MegalmError that names file, line and key
    (or the override) of the first thing that is wrong.
    """
    tree = functools.reduce(_merge, _layers(path, called, set()))
    for override in overrides:
        tree = _override(tree, override, option)
    return _validate(root, tree, option)


def dump(config: Config) -> str:
    """The whole resolved tree as YAML; `load` reads it back to an equal config."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


# ---- reading: every value remembers where it was written ----


@dataclass(frozen=True)
class _Node:
    """A value of the tree and its place: "file:line" of its key, or an option that sets it."""

    value: Any  # dict[str, _Node], list[_Node] or a scalar
    place: str


class _Loader(SafeLoader):
    """YAML 1.2's scalars: only true and false are booleans (not `off`), 3e-4 is a number, 12:30 and 007 are text."""

    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader of YAML, 1.1 or 1.2, could take for something other than text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Without quotes that escape, a reader folds these line breaks.
        style = '"' if any(character in data for character in "\n\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)

_FLOAT = re.compile(
    r"""(?: [-+]? (?: [0-9][0-9_]* \. [0-9_]* | \. [0-9][0-9_]* ) (?: [eE][-+]?[0-9]+ )?
        |   [-+]? [0-9][0-9_]* [eE][-+]?[0-9]+
        |   [-+]? \. (?: inf | Inf | INF )
        |   \. (?: nan | NaN | NAN ) )$""",
    re.VERBOSE,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), [*"-+0123456789"]
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


def _layers(path: str, called: str, seen: set[str], asked_by: str = "", above: tuple[str, ...] = ()) -> Iterator[_Node]:
    """The mappings of the files that `path` extends and then its own, each file once.

    `seen`: real paths of the files that were reached before; `above`: the files that led here.
    """
    real = os.path.realpath(path)
    if real in map(os.path.realpath, above):
        raise MegalmError(f"{asked_by}extends goes in a circle ({' -> '.join((*above, path))}): remove one of them")
    if real in seen:
        return
    seen.add(real)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        raise MegalmError(f"{asked_by}{called} {path} does not exist{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MegalmError(f"{asked_by}{called} {path} cannot be read ({error}): name a YAML file in UTF-8") from None

    tree = _parse(text, lambda line: f"{path}:{line}")
    if tree.value is None:
        tree = _Node({}, path)
    if not isinstance(tree.value, dict):
        raise MegalmError(f"{tree.place}: a {called} is a mapping (key: value), not {_show(_plain(tree))}")
    keys = dict(tree.value)
    extends = keys.pop("extends", _Node([], path))
    for base in extends.value if isinstance(extends.value, list) else [extends]:
        if not isinstance(base.value, str):
            raise MegalmError(f"{base.place}: extends is a path or a list of paths, not {_show(_plain(base))}")
        beside = os.path.normpath(os.path.join(os.path.dirname(path), base.value))
        yield from _layers(beside, called, seen, f"{base.place}: ", (*above, path))
    yield _Node(keys, path)


def _nearest_file(path: str) -> str:
    folder = os.path.dirname(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ": check the path"


def _parse(text: str, place: Callable[[int], str]) -> _Node:
    """The value that `text` spells; `place` turns a line number into words."""
    loader = _Loader(text)
    try:
        document = loader.get_single_node()
        return _Node(None, place(1)) if document is None else _node(loader, document, place, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise MegalmError(f"{place(mark.line + 1 if mark else 1)}: not valid YAML ({problem})") from None
    finally:
        loader.dispose()


def _node(loader: _Loader, node: yaml.Node, place: Callable[[int], str], above: tuple[yaml.Node, ...]) -> _Node:
    here = place(node.start_mark.line + 1)
    if node in above:
        raise MegalmError(f"{here}: this YAML alias contains itself: write the value out")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return _Node([_node(loader, item, place, above) for item in node.value], here)
    if not isinstance(node, yaml.MappingNode):
        return _Node(loader.construct_object(node), here)
    children: dict[str, _Node] = {}
    for key, value in node.value:
        at = place(key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            raise MegalmError(f"{at}: a key is text, not a list or a mapping")
        if key.value in children:
            raise MegalmError(
                f"{at}: key {key.value} is given twice (first at {children[key.value].place}): remove one of them"
            )
        children[key.value] = _Node(_node(loader, value, place, above).value, at)
    return _Node(children, here)


def _merge(base: _Node, over: _Node) -> _Node:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return _Node(merged, over.place)


def _override(tree: _Node, override: str, option: str) -> _Node:
    place = f"{option} {override}"
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise MegalmError(f"{place}: write a dotted key, = and a value, such as {option} train.steps=100")
    return _assign(tree, parts, 0, _parse(value, lambda line: place))


def _assign(node: _Node | None, parts: list[str], depth: int, value: _Node) -> _Node:
    """`node` with `value` merged in at parts[depth:]; what is missing on the way is made."""
    if depth == len(parts):
        return value if node is None else _merge(node, value)
    part, so_far = parts[depth], ".".join(parts[:depth])
    if node is None or node.value is None:
        node = _Node([] if part == "0" else {}, value.place)
    if isinstance(node.value, dict):
        child = _assign(node.value.get(part), parts, depth + 1, value)
        return _Node({**node.value, part: child}, node.place)
    if not isinstance(node.value, list):
        raise MegalmError(f"{value.place}: {so_far} is {_show(node.value)}, which has no key {part}")
    items = list(node.value)
    if not (part.isdecimal() and int(part) <= len(items)):
        raise MegalmError(
            f"{value.place}: {so_far} is a list of {len(items)}: after it comes an index from 0 to {len(items)} "
            f"(which appends), not {part}"
        )
    index = int(part)
    items[index : index + 1] = [_assign(items[index] if index < len(items) else None, parts, depth + 1, value)]
    return _Node(items, node.place)


def _plain(node: _Node) -> Any:
    """`node` without its places."""
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value


def _show(value: Any) -> str:
    """`value` as it would be written in YAML, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- validating ----

Location = tuple[str | int, ...]


def _validate(root: type[AnyConfig], tree: _Node, option: str) -> AnyConfig:
    values = _plain(tree)
    while True:
        try:
            return root.model_validate(values)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        repaired = [_repair(values, root, problem) for problem in problems]
        if not any(repaired):
            break
    # An unknown key is often why another one is missing.
    problems.sort(key=lambda problem: {"extra_forbidden": 0, "missing": 2}.get(problem["type"], 1))
    more = len(problems) - 1
    suffix = f" (and {more} more error{'s' if more > 1 else ''})" if more else ""
    raise MegalmError(_sentence(root, tree, problems[0], option) + suffix)


def _repair(values: Any, root: type[Config], problem: Any) -> bool:
    """Change `values` where strict types are stricter than YAML's spelling; whether anything changed.

    A float that is exactly an integer (1e9) becomes one; a branch left out becomes an empty one, so that what is
    reported is each required key in it.
    """
    *above, last = problem["loc"] or ("",)
    parent = values
    for step in above:
        try:
            parent = parent[step]
        except (KeyError, IndexError, TypeError):  # a step that pydantic adds for the member of a union
            return False
    value = problem["input"]
    if problem["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        parent[last] = int(value)
        return True
    if problem["type"] == "missing" and _dotted(problem["loc"], "N") in dict(_branches(root)):
        parent[last] = {}
        return True
    return False


def _sentence(root: type[Config], tree: _Node, problem: Any, option: str) -> str:
    location, kind = problem["loc"], problem["type"]
    node, known = _deepest(tree, location)
    if kind == "extra_forbidden":
        return f"{node.place}: unknown key {_dotted(location)}{_suggestion(root, location)}"
    if kind == "missing":
        key = _dotted(location)
        return f"{node.place}: {key} is missing: add it to the file, or give {option} {key}=VALUE"
    key = _dotted(known)
    if kind in ("value_error", "assertion_error"):
        message = str(problem["ctx"]["error"])
        return f"{_places(node, message)}: {f'{key}: ' if key else ''}{message}"
    expected = {
        "model_type": "should be a mapping of keys",
        "dict_type": "should be a mapping of keys",
        "list_type": "should be a list",
        "string_type": "should be text (in quotes if it looks like something else)",
    }.get(kind, problem["msg"].removeprefix("Input "))
    return f"{node.place}: {key} {expected}, not {_show(problem['input'])}"


def _deepest(tree: _Node, location: Location) -> tuple[_Node, Location]:
    """The node at `location`, or the last one on the way that was written, and where that is."""
    node, known = tree, list[str | int]()
    for step in location:
        inside = isinstance(node.value, dict) and step in node.value
        if inside or (isinstance(node.value, list) and isinstance(step, int) and step < len(node.value)):
            node = node.value[step]
            known.append(step)
    return node, tuple(known)


def _places(node: _Node, message: str) -> str:
    """Where the values below `node` that `message` names were written; where `node` was if none was."""
    places = []
    for word in re.findall(r"\w+(?:\.\w+)*", message):
        location = tuple(int(part) if part.isdecimal() else part for part in word.split("."))
        found, known = _deepest(node, location)
        if known == location and not isinstance(found.value, dict) and found.place not in places:
            places.append(found.place)
    return ", ".join(places) or node.place


def _suggestion(root: type[Config], location: Location) -> str:
    *above, name = (str(step) for step in location)
    branch = _dotted(location[:-1], "N")
    keys = [f"{prefix}.{field}".lstrip(".") for prefix, model in _branches(root) for field in model.model_fields]
    names = {key.rpartition(".")[2] for key in keys}
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == branch]
    if name in names:
        matches = [key for key in keys if key.rpartition(".")[2] == name]
    elif close := difflib.get_close_matches(name, siblings, n=1):
        matches = [".".join((*above, close[0]))]
    else:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
        matches = [key for key in keys if key.rpartition(".")[2] in close]
    if not matches:
        return f"; known here: {', '.join(siblings)}"
    *first, last = matches
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?"


def _dotted(location: Location, index: str = "") -> str:
    """`location` as a dotted key; list indices are replaced by `index` if it is given."""
    return ".".join(index if index and isinstance(step, int) else str(step) for step in location)


# ---- describing ----


@dataclass(frozen=True)
class Key:
    """One key of a branch, in words."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Branch:
    """One branch of the tree: its dotted key ("" for the root; N stands for a list index), meaning and keys."""

    key: str
    meaning: str
    keys: tuple[Key, ...]


def describe(root: type[Config]) -> list[Branch]:
    """Every branch of the tree below `root`, parents before children, in the order of the fields."""
    described = []
    for prefix, model in _branches(root):
        properties = model.model_json_schema()["properties"]
        keys = []
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if field.is_required():
                shown = "required"
            elif isinstance(default, Config):
                shown = ""
            else:
                shown = f"`{default if default and isinstance(default, str) else json.dumps(default)}`"
            keys.append(Key(name, _type(properties[name]), shown, field.description or ""))
        described.append(Branch(prefix, (model.__doc__ or "").strip(), tuple(keys)))
    return described


def _branches(root: type[Config], prefix: str = "") -> Iterator[tuple[str, type[Config]]]:
    yield prefix, root
    for name, field in root.model_fields.items():
        for suffix, model in _models(field.annotation):
            yield from _branches(model, f"{prefix}.{name}{suffix}".lstrip("."))


def _models(annotation: Any) -> Iterator[tuple[str, type[Config]]]:
    """The configs in a field's type; those in a list are at ".N"."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield "", annotation
    suffix = ".N" if get_origin(annotation) is list else ""
    for argument in get_args(annotation):
        for inner, model in _models(argument):
            yield suffix + inner, model


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return "section"
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}s"
    names = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "mapping",
    }
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    return " ".join([names.get(schema["type"], schema["type"]), ", ".join(bounds)]).strip()
