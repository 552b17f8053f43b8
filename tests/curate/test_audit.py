"""The numbers of the audit add up, whatever the tasks, and the page shows them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megalm.curate import audit, executor, page
from megalm.curate.document import Document
from megalm.curate.recipe import Recipe
from megalm.errors import MegalmError
from tests.curate.conftest import STEPS, MakeRecipe
from tests.curate.test_executor import written


def report_of(recipe: Recipe) -> dict[str, Any]:
    executor.run(recipe, 1)
    found: dict[str, Any] = json.loads((Path(recipe.directory) / "audit.json").read_text())
    return found


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    steps = [{key: value for key, value in step.items() if key != "seconds"} for step in report["steps"]]
    return report | {"steps": steps, "seconds": None}


def test_the_numbers_add_up(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    report = report_of(recipe)
    documents = written(recipe)
    assert report["documents_read"] == 300 and report["sources"]["web"]["malformed"] == {"not JSON": 3}
    before = report["documents_read"], report["characters_read"]
    for step in report["steps"]:
        assert (step["documents_in"], step["characters_in"]) == before
        assert step["documents_in"] - step["documents_out"] == sum(step["reasons"].values())
        for reason, samples in step["samples"].items():
            assert len(samples) == min(step["reasons"][reason], recipe.audit.samples)
        for measure in step["measures"].values():
            assert sum(measure["kept"]) == step["documents_out"]
            assert sum(measure["removed"]) == step["documents_in"] - step["documents_out"]
        before = step["documents_out"], step["characters_out"]
    assert before == (len(documents), sum(len(each["text"]) for each in documents))
    assert (report["documents_written"], report["characters_written"]) == before
    assert 100 < report["steps"][0]["changed"] <= report["steps"][0]["documents_out"] < 300
    sums = report["counts"]["language"]
    assert sum(each["documents"] for each in sums.values()) == len(documents)
    assert sum(report["lengths"]["kept"]) == len(documents) and sum(report["lengths"]["removed"]) == 300
    sizes = report["steps"][1]["merge"]["cluster_sizes"]
    assert sum(int(size) * number for size, number in sizes.items()) == report["steps"][1]["documents_in"]


def test_tasks_and_batches_change_no_number(make_recipe: MakeRecipe) -> None:
    one = report_of(make_recipe("one", tasks=1, batches={"documents": 300, "per_chunk": 1}))
    many = report_of(make_recipe("many", tasks=3, batches={"documents": 1, "per_chunk": 9}))
    assert without_seconds(one) == without_seconds(many)


def test_samples_are_texts_that_were_removed(make_recipe: MakeRecipe) -> None:
    report = report_of(make_recipe(audit={"samples": 2, "sample_characters": 10}))
    (samples,) = report["steps"][0]["samples"].values()
    assert len(samples) == 2
    for sample in samples:
        assert int(sample["detail"].split()[0]) < 35 and len(sample["text"]) <= 10
    again = report_of(make_recipe("other", tasks=1, audit={"samples": 2, "sample_characters": 10}))
    assert again["steps"][0]["samples"] == report["steps"][0]["samples"]


def test_what_is_counted_is_bounded() -> None:
    tally = audit.Tally()
    documents = [Document(str(number), "x" * number, {"language": f"l{number}"}) for number in range(1000)]
    audit.record_output(tally, documents, ["language"], 0)
    assert len(tally.counts["language"]) == audit.MOST_VALUES + 1
    assert tally.counts["language"][audit.OTHERS][0] == 1000 - audit.MOST_VALUES
    again = audit.Tally.of_plain(json.loads(json.dumps(tally.plain())))
    assert again == tally
    again.add(tally, 5)
    assert again.documents == 2000 and again.lengths.kept["7"] == 2
    assert {audit.rounded(value) for value in (1234.0, 1235.0, 1229.9)} == {"1.23e+03", "1.24e+03"}


def test_quantiles() -> None:
    counts = {"1": 50, "2": 40, "10": 10}
    assert audit.quantiles(counts, (0.05, 0.5, 0.51, 0.9, 0.95)) == [1.0, 1.0, 2.0, 2.0, 10.0]
    assert audit.quantiles({}) == []


def test_the_page_needs_nothing_else(make_recipe: MakeRecipe, inputs: Path) -> None:
    (inputs / "3.jsonl").write_text(json.dumps({"text": "<script>alert(1)</script>"}) + "\n")
    recipe = make_recipe(name="a <b>name</b>", audit={"samples": 100})
    executor.run(recipe, 1)
    drawn = (Path(recipe.directory) / "audit.html").read_text()
    assert "<script>" not in drawn and "&lt;script&gt;alert(1)" in drawn and "<b>" not in drawn
    assert not re.search(r"""(src|href)=["'](?!#)""", drawn)
    assert drawn.count("<svg") == drawn.count("</svg>") > 8
    assert "你好" in drawn and "nan" not in re.sub(r">[^<]*<", "", drawn)


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [1.0, 10.0, 1e5], [-3.0, 0.0, 7.0], [5.0, 5.0001], [1e-9, 1e9]])
def test_every_document_stands_in_a_bin(values: list[float]) -> None:
    measure = audit.Measure()
    for number, value in enumerate(values, 1):
        measure.kept[audit.rounded(value)] += number
        measure.removed[audit.rounded(value)] += 10
    drawn = page.histogram("score", audit.histogram(measure))
    told = [tuple(map(int, pair)) for pair in re.findall(r": (\d+) kept, (\d+) removed</title>", drawn)]
    assert sum(front for front, _ in told) == sum(range(1, len(values) + 1)) * 2, "a bar each for kept and removed"
    assert sum(back for _, back in told) == 20 * len(values)
    assert "nan" not in drawn and "inf" not in drawn


def test_an_unreadable_end_is_no_error(make_recipe: MakeRecipe) -> None:
    with pytest.raises(MegalmError, match="names no file"):
        executor.run(make_recipe(sources=[{"name": "x", "path": "/nowhere/at/all/*.jsonl"}]), 1)
    recipe = make_recipe("none", steps=[{"kind": f"{STEPS}:LongEnough", "characters": 10**6}])
    report = report_of(recipe)
    assert report["documents_written"] == 0 and "<svg" in (Path(recipe.directory) / "audit.html").read_text()
