"""One document's way is what happened to it in the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config import dump
from megalm.curate import executor
from megalm.curate.trace import changes, find, trace
from megalm.errors import MegalmError
from tests.curate.conftest import MakeRecipe
from tests.curate.test_executor import REPOSITORY, written


def test_the_way_of_every_document_is_what_happened(make_recipe: MakeRecipe, inputs: Path) -> None:
    recipe = make_recipe()
    before = list(trace(recipe, find(recipe, "web/0.jsonl@0")))
    assert before[1].note and "run the recipe first" in before[1].note
    executor.run(recipe, 1)
    kept = {each["id"]: each["text"] for each in written(recipe)}
    position, rejected = 0, 0
    for line in (inputs / "1.jsonl").read_bytes().splitlines(keepends=True):
        identity = f"web/1.jsonl@{position}"
        position += len(line)
        if line.startswith(b'{"text": broken'):
            with pytest.raises(MegalmError, match="could not be read: not JSON"):
                find(recipe, identity)
            continue
        document = find(recipe, identity)
        *_, last = trace(recipe, document)
        assert (last.rejected is None) == (identity in kept)
        rejected += last.rejected is not None
        if identity in kept:
            assert document.text == kept[identity] and last.index == 2
    assert rejected > 10


def test_what_is_not_there_is_told(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    for identity, words in [
        ("nowhere/x", "begins with the name of no source: they are web"),
        ("web/9.jsonl@0", "has no document"),
        ("web/0.jsonl@x", "has no document"),
    ]:
        with pytest.raises(MegalmError, match=words):
            find(recipe, identity)


def test_changes_are_lines() -> None:
    assert changes("a\nb", "a\nb") == []
    assert changes("a\nb\nc", "a\nB\nc") == ["@@ -2 +2 @@", "-b", "+B"]


def test_the_files_put_aside_name_what_can_be_traced(make_recipe: MakeRecipe) -> None:
    import zstandard

    recipe = make_recipe()
    executor.run(recipe, 1)
    for path in (Path(recipe.directory) / "aside").iterdir():
        for line in zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().splitlines():
            with pytest.raises(MegalmError, match="not JSON"):
                find(recipe, json.loads(line)["place"])


def test_the_commands(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(make_recipe()))

    def command(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, f"tools/{tool}", *arguments]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    wrong = command("curate.py", "--config", str(path), "--set", "tsaks=3")
    assert wrong.returncode == 2 and "did you mean tasks" in wrong.stderr and "Traceback" not in wrong.stderr
    early = command("curate.py", "--config", str(path), "--only", "phase:0")
    assert early.returncode == 2 and "has no plan yet" in early.stderr
    shown = command("trace_document.py", str(path), "web/2.jsonl@0")
    assert shown.returncode == 0 and "run the recipe first" in shown.stdout, shown.stderr
