"""Augmented runs: ids are dropped by the sample's number, so layouts agree and a resumed run goes on as it would."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from tests.distributed.ranks import RankFailed, run_ranks
from tests.training.runs import CrashAt, curve, train_run

Settings = Callable[..., dict[str, Any]]


def tree_of(settings: Settings, rows: Path, name: str, **augment: Any) -> dict[str, Any]:
    tree = settings(name, task={"kind": "continuation", "augment": augment}, evaluate={"every": 8})
    tree["data"] |= {"sources": [{"path": str(rows)}], "held_out": [{"path": str(rows)}]}
    return tree


def test_dropped_ids_know_no_layout_and_no_resume(settings: Settings, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text[:200]}) + "\n" for text in topics.values()))
    plain, one, two, crashed = (
        tree_of(settings, rows, name, token_dropout=share)
        for name, share in (("plain", 0.0), ("one", 0.3), ("two", 0.3), ("crashed", 0.3))
    )
    for tree, ranks in ((plain, 1), (one, 1), (two, 2)):
        assert run_ranks(ranks, train_run, tree) == [0] * ranks
    with pytest.raises(RankFailed):
        run_ranks(1, train_run, crashed, CrashAt(6))
    assert run_ranks(1, train_run, crashed) == [0]
    assert curve(crashed) == curve(one), "bitwise"
    losses = {
        name: [record["loss"] for record in curve(tree)]
        for name, tree in (("plain", plain), ("one", one), ("two", two))
    }
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["plain"] != pytest.approx(losses["one"], rel=1e-4), "negative control"
