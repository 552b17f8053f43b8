"""A recipe's folder, and how its sources are split into tasks.

DIRECTORY/recipe.yaml                 the resolved recipe
DIRECTORY/plan/00000.jsonl, plan.json the files of each task; what they are in all
DIRECTORY/text/00000-000000.jsonl.zst documents of a task and a chunk
DIRECTORY/shards/train, held_out      the same as ids
DIRECTORY/audit.html, audit.json      what happened
DIRECTORY/aside/00000-000000.jsonl.zst what could not be read
DIRECTORY/work/                       states, documents between phases, sketches, verdicts
"""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megalm.config import dump
from megalm.curate.files import PARTIAL, write_whole, writing
from megalm.curate.recipe import Recipe, build, phases
from megalm.curate.sources import File, is_url, list_files
from megalm.errors import MegalmError

SMALLEST_PART = 16 * 2**20
"""Bytes. A plain JSONL file is cut into parts of at least this size where there are more tasks than files."""


@dataclass(frozen=True)
class Folder:
    """Where things lie below a recipe's directory."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan" / "plan.json"

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def aside(self) -> Path:
        return self.root / "aside"

    def ids(self, source: str | None) -> Path:
        """Ids of documents, before they are put into shards: of a source where each has its own, else of all."""
        return self.root / "work" / "ids" / (source or "")

    def task(self, task: int) -> Path:
        return self.root / "plan" / f"{task:05d}.jsonl"

    def state(self, phase: int, task: int) -> Path:
        return self.root / "work" / "state" / str(phase) / f"{task:05d}.json"

    def failure(self, phase: int, task: int) -> Path:
        return self.root / "work" / "failures" / f"{phase}-{task:05d}.txt"

    def documents(self, phase: int) -> Path:
        """What a phase hands on to the next."""
        return self.root / "work" / "documents" / str(phase)

    def sketches(self, phase: int) -> Path:
        """What a phase sketches for the merge behind it."""
        return self.root / "work" / "sketches" / str(phase)

    def merged(self, phase: int) -> Path:
        """What the merge before a phase decided."""
        return self.root / "work" / "merged" / str(phase)


@dataclass(frozen=True)
class Plan:
    """How a recipe is worked through."""

    recipe: Recipe
    folder: Folder
    tasks: int
    phases: list[tuple[int, int]]
    """(first, last + 1) of the steps of each."""
    files: int
    bytes: int
    left_out: dict[str, dict[str, int]]
    """Of each source, what of its folders was not taken, by reason."""
    digests: dict[str, str]
    """Of the files that steps read and of the tokenizer of the shards, by path: hashes of what they hold."""

    def items(self, task: int) -> Iterator[tuple[int, File]]:
        """(index of the source, file) of a task, in order."""
        with self.folder.task(task).open(encoding="utf-8") as stream:
            for line in stream:
                record = json.loads(line)
                yield record.pop("source"), File(**record)

    def check(self) -> None:
        """Raise MegalmError if what steps read is not what it was when the run was begun."""
        now = _digests(self.recipe)
        for path in sorted({*self.digests, *now}):
            if now.get(path) != self.digests.get(path):
                raise MegalmError(
                    f"{path}, which decides what is kept or how it is written, has changed since {self.folder.root} "
                    "was begun: put it back as it was, or name another directory to begin again with it"
                )


def prepare(recipe: Recipe) -> Plan:
    """Make the recipe's folder, or open the one that is there.

    Raises MegalmError where it was made by another recipe or of files that have changed since, and where a source names
    no file.
    """
    folder = Folder(Path(recipe.directory))
    digests = _digests(recipe)
    if recipe.audit.tokenizer:
        from megalm.tokenizer.load import load

        load(recipe.audit.tokenizer)  # before hours of work that would end at it
    if folder.recipe.exists():
        _compare(folder, recipe)
    elif folder.root.is_dir() and any(not path.name.startswith(".") for path in folder.root.iterdir()):
        raise MegalmError(f"{folder.root} holds something else than a recipe's output: name another directory")
    parts, left_out = _parts(recipe)
    if folder.plan.exists():
        plan = opened(recipe)
        _unchanged(plan, parts)
        plan.check()
        return plan
    with writing(folder.root):
        for place in (folder.root, folder.plan.parent):
            for partial in place.glob(f".*{PARTIAL}"):  # of a process that was killed
                partial.unlink(missing_ok=True)
        write_whole(folder.recipe, dump(recipe))
        for task, items in enumerate(parts):
            lines = [json.dumps({"source": index, **asdict(file)}, ensure_ascii=False) for index, file in items]
            write_whole(folder.task(task), "".join(line + "\n" for line in lines))
        whole = [file for items in parts for _, file in items if not file.start]
        made = {
            "tasks": len(parts),
            "files": len(whole),
            "bytes": sum(file.size for items in parts for _, file in items),
            "left_out": {name: dict(counts) for name, counts in left_out.items()},
            "digests": digests,
        }
        write_whole(folder.plan, json.dumps(made, indent=1) + "\n")  # the last one: with it the plan is whole
    return opened(recipe)


def opened(recipe: Recipe) -> Plan:
    """The plan that prepare() has made. Raises MegalmError if it has not."""
    folder = Folder(Path(recipe.directory))
    try:
        made: dict[str, Any] = json.loads(folder.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MegalmError(f"{folder.root} has no plan yet: run tools/curate.py --config RECIPE first") from None
    known = ("tasks", "files", "bytes", "left_out", "digests")
    if missing := [name for name in known if name not in made]:
        raise MegalmError(
            f"{folder.plan} says nothing of {missing[0]}: another version of megalm made it; end the run with that one "
            "or name another directory"
        )
    return Plan(recipe, folder, phases=phases(build(recipe.steps)), **{name: made[name] for name in known})


def _compare(folder: Folder, recipe: Recipe) -> None:
    before = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    now = yaml.safe_load(dump(recipe))
    different = [key for key in now if now[key] != before.get(key)]
    if different == ["audit"]:
        return
    if different:
        raise MegalmError(
            f"{folder.root} was begun with another recipe ({', '.join(different)} differ): name another directory, or "
            "remove it to begin again"
        )


def _digests(recipe: Recipe) -> dict[str, str]:
    """Plan.digests, as the files are now. Raises MegalmError for one that cannot be read: before hours of work that
    would end at it."""
    found = {}
    for index, step in enumerate(build(recipe.steps)):
        for path in step.files():
            try:
                with open(path, "rb") as stream:
                    found[path] = hashlib.file_digest(stream, "blake2b").hexdigest()
            except OSError as error:
                raise MegalmError(
                    f"steps.{index} ({step.kind}) needs {path}, which cannot be read ({error.strerror}): correct the "
                    "path"
                ) from None
    if recipe.output.shards is not None:
        from megalm.tokenizer.load import load

        found[recipe.output.shards.tokenizer] = load(recipe.output.shards.tokenizer).fingerprint
    return found


def _unchanged(plan: Plan, parts: Sequence[Sequence[tuple[int, File]]]) -> None:
    """Raise MegalmError, naming a file, if those of the sources are not those of the plan."""
    planned = (item for task in range(plan.tasks) for item in plan.items(task))
    before, now = _whole(planned), _whole(item for items in parts for item in items)
    changed = [each for each in now if now[each] != before.get(each)] + [each for each in before if each not in now]
    if not changed:
        return
    first, root = changed[0], plan.folder.root
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    way_out = "put it back as it was"
    if first not in now:
        (path, _, _), what = before[first], "is gone"
    elif first not in before:
        (path, _, _), what, way_out = now[first], "is new", "take it away"
    else:
        (path, size, _), what = now[first], "has changed"
        _, old_size, old = before[first]
        if size == old_size and not is_url(path):
            seconds, rest = divmod(int(old), 10**9)
            way_out += f" (if only its time is another: touch -d @{seconds}.{rest:09d} {shlex.quote(path)})"
    raise MegalmError(
        f"{path}{more} {what} since {root} was begun: {way_out}, or name another directory for what is there now"
    )


def _whole(parts: Iterable[tuple[int, File]]) -> dict[tuple[int, str], tuple[str, int, str]]:
    """(index of the source, name) -> (path, bytes, File.modified) of whole files."""
    files: dict[tuple[int, str], tuple[str, int, str]] = {}
    for index, file in parts:
        _, size, _ = files.get((index, file.name), ("", 0, ""))
        files[index, file.name] = file.path, size + file.size, file.modified
    return files


def _parts(recipe: Recipe) -> tuple[list[list[tuple[int, File]]], dict[str, Counter[str]]]:
    """The (source, file) pairs of each task, and what was left out of each source.

    Tasks are runs of the files in order, of about as many bytes.
    """
    files: list[tuple[int, File]] = []
    left_out = {}
    for index, source in enumerate(recipe.sources):
        found, left_out[source.name] = list_files(source, f"sources.{index}")
        files += [(index, file) for file in found]
    total = sum(file.size for _, file in files) or 1
    largest = max(total // recipe.tasks, SMALLEST_PART)
    pieces = [(index, piece) for index, file in files for piece in _cut(file, largest)]
    tasks: dict[int, list[tuple[int, File]]] = {}
    passed = 0
    for number, (index, piece) in enumerate(pieces):
        share = (passed + piece.size / 2) / total if total > 1 else number / len(pieces)
        tasks.setdefault(min(int(share * recipe.tasks), recipe.tasks - 1), []).append((index, piece))
        passed += piece.size
    return list(tasks.values()), left_out


def _cut(file: File, largest: int) -> list[File]:
    """Parts of a file whose reader can begin anywhere."""
    count = -(-file.size // largest)
    if file.format != "jsonl" or count < 2 or file.path.lower().endswith((".gz", ".zst")):
        return [file]
    bounds = [file.size * part // count for part in range(count + 1)]
    return [
        replace(file, start=start, stop=stop if stop < file.size else None, size=stop - start)
        for start, stop in zip(bounds[:-1], bounds[1:])
    ]
