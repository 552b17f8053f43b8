"""One document's way through a recipe: what each step changed, and where it was left behind."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.curate.document import Document
from megalm.curate.plan import Folder
from megalm.curate.readers import READERS, SEPARATOR, Malformed, PassedOver, open_reader
from megalm.curate.recipe import Recipe, build
from megalm.curate.sources import list_files
from megalm.curate.step import Merging
from megalm.errors import MegalmError


@dataclass(frozen=True)
class Stage:
    """What a step did. changes: lines of a unified diff of the texts. metadata: what it added or changed. note: why
    nothing can be said of it."""

    index: int
    kind: str
    characters_in: int
    characters_out: int
    changes: list[str]
    metadata: dict[str, Any]
    measures: dict[str, float]
    rejected: str | None = None
    note: str | None = None


def find(recipe: Recipe, identity: str) -> Document:
    """The document of an id as the recipe reads it. Raises MegalmError if there is none, with what stands there."""
    for index, source in enumerate(recipe.sources):
        if not identity.startswith(f"{source.name}/"):
            continue
        inner = identity.removeprefix(f"{source.name}/")
        name, at, position = inner.rpartition(SEPARATOR)
        for file in list_files(source, f"sources.{index}")[0]:
            whole = READERS[file.format].is_whole_file
            if file.name != (inner if whole else name) or not (whole or (at and position.isdecimal())):
                continue
            # Of a part that begins in the middle of a file it is the part before that reads what crosses the border.
            for found, _ in open_reader(source, file).read(0 if whole else int(position)):
                if isinstance(found, Document) and found.id == identity:
                    return found
                if isinstance(found, Malformed):
                    raise MegalmError(f"{identity} could not be read: {found.reason} {found.detail}".rstrip())
                if isinstance(found, PassedOver):
                    raise MegalmError(f"{identity} is no document: it is among the {found.reason}")
                raise MegalmError(f"no document begins at {identity}; the next is {found.id}")
        raise MegalmError(
            f"the source {source.name} has no document {inner}: ids are SOURCE/FILE, or SOURCE/FILE{SEPARATOR}POSITION "
            "in a file of many; the output, the report and the files in aside/ name them"
        )
    known = ", ".join(source.name for source in recipe.sources)
    raise MegalmError(f"{identity} begins with the name of no source: they are {known}")


def trace(recipe: Recipe, document: Document) -> Iterator[Stage]:
    """Each step that the document comes to; the last one is where it is rejected, if it is."""
    folder = Folder(Path(recipe.directory))
    phase = 0
    for index, step in enumerate(build(recipe.steps)):
        text, metadata = document.text, json.loads(json.dumps(document.metadata))
        note = None
        if isinstance(step, Merging):
            phase += 1
            verdicts = folder.merged(phase) / "verdicts"
            if not verdicts.exists():
                note = "it decides when it has seen all documents: run the recipe first"
            else:
                step.judge(verdicts)
        rejection = step.apply([document])[0] if note is None else None
        added = {key: value for key, value in document.metadata.items() if metadata.get(key) != value}
        rejected = None
        if rejection is not None:
            rejected = f"{rejection.reason} ({rejection.detail})" if rejection.detail else rejection.reason
        yield Stage(
            index,
            step.kind,
            len(text),
            len(document.text),
            changes(text, document.text),
            added,
            step.measure(document) if note is None else {},
            rejected,
            note,
        )
        if rejection is not None:
            return


def changes(before: str, after: str) -> list[str]:
    """The lines that differ, as a unified diff without its header."""
    if before == after:
        return []
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
