"""What a recipe may say, and how a mistake in it is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config import dump, load
from megalm.curate.document import Document
from megalm.curate.recipe import Recipe, build, phases
from megalm.errors import MegalmError
from tests.curate.conftest import STEPS, MakeRecipe

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = f"""
name: notes
directory: out
sources:
  - name: notes
    path: notes/*.jsonl
steps:
  - kind: {STEPS}:LongEnough
    characters: 12
"""


def said(tmp_path: Path, text: str) -> str:
    """The sentence in which a recipe is refused."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(MegalmError) as refused:
        load(str(path), Recipe)
    return str(refused.value)


def test_a_recipe_is_read_and_dumped(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = load(str(path), Recipe, ["tasks=3"])
    assert recipe.tasks == 3 and recipe.steps[0]["characters"] == 12
    path.write_text(dump(recipe))
    assert load(str(path), Recipe) == recipe


@pytest.mark.parametrize(
    ("wrong", "right", "words"),
    [
        ("characters: 12", "charcters: 12", ["recipe.yaml:9", "steps.0.charcters", "did you mean characters"]),
        ("characters: 12", "characters: -1", ["recipe.yaml:9", "steps.0.characters", "greater than 0"]),
        ("characters: 12", "characters: many", ["recipe.yaml:9", "integer", "many"]),
        (f"kind: {STEPS}:LongEnough", "kindd: x", ["recipe.yaml", "steps.0 has no kind"]),
        (f"{STEPS}:LongEnough", f"{STEPS}:Longer", ["recipe.yaml:8", "has no class Longer"]),
        (f"{STEPS}:LongEnough", "no.such.module:Step", ["recipe.yaml:8", "cannot be imported"]),
        (f"{STEPS}:LongEnough", "pathlib:Path", ["recipe.yaml:8", "is not a megalm.curate.step.Step"]),
        ("path: notes", "paht: notes", ["recipe.yaml:6", "paht", "did you mean sources.0.path"]),
        ("steps:", "step:", ["recipe.yaml:7", "did you mean steps"]),
        ("directory: out", "directory: out\ntasks: 0", ["tasks", "greater than or equal to 1"]),
        ("directory: out", "directory: out\ntasks: 100001", ["tasks", "less than or equal to 100000"]),
        ("directory: out", "directory: out\noutput: {text: null}", ["output.text and output.shards are both null"]),
        ("path: notes", "share: 1.5\n    path: notes", ["sources.0.share", "less than or equal to 1"]),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, wrong: str, right: str, words: list[str]) -> None:
    assert wrong in RECIPE
    sentence = said(tmp_path, RECIPE.replace(wrong, right))
    assert all(word in sentence for word in words), sentence


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = RECIPE.replace("\nsteps:", "\n  - {name: notes, path: more}\nsteps:")
    assert "sources.1.name notes is the name of two sources" in said(tmp_path, twice)


def test_every_merging_step_begins_a_phase(make_recipe: MakeRecipe) -> None:
    plain, merging = {"kind": f"{STEPS}:LongEnough"}, {"kind": f"{STEPS}:FirstOnly"}
    assert phases(build([])) == [(0, 0)]
    assert phases(build([plain, plain])) == [(0, 2)]
    assert phases(build([merging])) == [(0, 0), (0, 1)]
    assert phases(build([plain, merging, plain, merging])) == [(0, 1), (1, 3), (3, 4)]


def test_curation_needs_no_torch() -> None:
    code = "import sys, megalm.curate.executor, megalm.curate.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_a_misspelt_kind_gets_the_closest_one(tmp_path: Path) -> None:
    sentence = said(tmp_path, RECIPE.replace(f"{STEPS}:LongEnough", "langauge"))
    assert "recipe.yaml:8" in sentence and "no kind of step; did you mean language?" in sentence
    sentence = said(tmp_path, RECIPE.replace(f"{STEPS}:LongEnough", "zzz"))
    assert "known here: c4, decontaminate" in sentence
    settings = "kind: perplexity\n    models: {en: {path: x, bukets: [3]}}"
    sentence = said(tmp_path, RECIPE.replace(f"kind: {STEPS}:LongEnough", settings))
    assert "steps.0.models.en.bukets is unknown to the step perplexity; did you mean buckets?" in sentence


def test_the_lengths_and_shares_of_repeated_sequences_are_checked(tmp_path: Path) -> None:
    """What is too short was ignored, and what is too long ended a run at its first document."""
    for given, words in [
        (
            "top_grams: {1: 0.1}",
            "steps.0.en.top_grams.1.[key] (gopher_repetition): should be greater than or equal to 2",
        ),
        ("top_grams: {-3: 0.1}", "greater than or equal to 2"),
        ("repeated_grams: {33: 0.1}", "less than or equal to 32"),
        ("repeated_grams: {4: 1.5}", "less than or equal to 1"),
        ("repeated_grams: {4: -0.1}", "greater than or equal to 0"),
        ("repeated_grams: {four: 0.1}", "valid integer"),
    ]:
        settings = f"kind: gopher_repetition\n    en: {{{given}}}"
        assert words in said(tmp_path, RECIPE.replace(f"kind: {STEPS}:LongEnough\n    characters: 12", settings))


def test_the_lengths_of_repeated_sequences_are_read_from_a_file(tmp_path: Path) -> None:
    settings = "kind: gopher_repetition\n    en: {top_grams: {2: 0.1, 32: 0.2}}"
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(f"kind: {STEPS}:LongEnough\n    characters: 12", settings))
    [step] = build(load(str(path), Recipe).steps)
    assert step.settings.en.top_grams == {2: 0.1, 32: 0.2}
    assert step.apply([Document("1", "spam spam " * 40, {"language": "en"})])[0].reason == "one 2-gram over and over"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_megalm_are_valid(path: Path) -> None:
    assert load(str(path), Recipe).steps
