"""Whole runs that train a part: frozen weights stay to the bit, and a run goes on under another layout."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.errors import MegalmError
from tests.distributed.ranks import run_ranks
from tests.training.conftest import tree_of
from tests.training.runs import curve, train_run, whole_state
from tests.training.test_another_layout import LAYOUTS, LOSS, save_at_once, worst

METHODS: dict[str, dict[str, Any]] = {
    "frozen": {"freeze": ["embedding.*", "blocks.*.feed_forward.*"], "layer_decay": 0.9},
    "lora": {"method": "lora", "also_train": ["norm.*"]},
    "dora": {"method": "dora", "targets": ["query", "value", "output", "down"]},
}
MOVES = [
    ("frozen", "data 2, ZeRO 3", "pipeline 2"),
    ("lora", "tensor 2, ZeRO 0", "data 2, ZeRO 3"),
    ("dora", "data 2, ZeRO 3", "tensor 2, ZeRO 0"),
]
"""Method, layout before and after."""


def tree_in(corpus: Path, directory: Path, method: str, layout: str, **sections: Any) -> dict[str, Any]:
    return tree_of(corpus, directory, parallel=LAYOUTS[layout][1], tuning=METHODS[method], **sections)


def start(tree: dict[str, Any], layout: str, plant: Callable[[Any], None] | None = None) -> None:
    assert run_ranks(LAYOUTS[layout][0], train_run, tree, plant) == [0] * LAYOUTS[layout][0]


def is_frozen(key: str, method: str) -> bool:
    if method == "frozen":
        return key.startswith("embedding.") or ".feed_forward." in key
    return "lora_" not in key and not (method == "lora" and key.startswith("norm."))


@pytest.mark.parametrize(("method", "before", "after"), MOVES)
def test_goes_on_elsewhere(method: str, before: str, after: str, corpus: Path, tmp_path: Path) -> None:
    whole = tree_in(corpus, tmp_path / "whole", method, before)
    start(whole, before)
    moved = tree_in(corpus, tmp_path / "moved", method, after)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-8")
    start(moved, after, save_at_once)
    half, again = whole_state(whole, 4), whole_state(moved, 4)
    assert half.keys() == again.keys() and all(torch.equal(half[key], again[key]) for key in half)
    assert worst(curve(moved), curve(whole), "loss") < LOSS
    end, other = whole_state(whole, 8), whole_state(moved, 8)
    for key, tensor in end.items():
        if is_frozen(key, method):
            assert key.endswith("/weight"), "moments of what is not trained"
            assert torch.equal(tensor, half[key]) and torch.equal(other[key], half[key]), key
        elif key.endswith("/weight"):
            assert not torch.equal(tensor, half[key]), key


@pytest.mark.parametrize("layout", ["one rank", "tensor 2, ZeRO 0", "data 2, ZeRO 3"])
def test_adapters_start_on_the_weights_of_another_run(layout: str, corpus: Path, tmp_path: Path) -> None:
    base = tree_of(corpus, tmp_path / "base")
    start(base, "one rank")
    tree = tree_in(
        corpus, tmp_path / "run", "dora", layout, model=base["model"] | {"init_from": str(tmp_path / "base")}
    )
    tree["checkpoint"] = {"every": 1}
    start(tree, layout, start_saved)
    there, here = whole_state(base, 8), whole_state(tree, 0)
    for key, tensor in there.items():
        if key.endswith("/weight"):
            assert torch.equal(here[key], tensor), key
    for key, tensor in here.items():
        name = key.removesuffix("/weight")
        if name.endswith(".lora_magnitude"):
            norms = there[name.replace("lora_magnitude", "weight") + "/weight"].double().square().sum(1).sqrt()
            assert torch.equal(tensor, norms.float()), name
        elif name.endswith(".lora_B"):
            assert not tensor.any()


def start_saved(run: Any) -> None:
    """Write what the run starts from, as a checkpoint of step 0."""
    from megalm.training import resume

    run.data_state = {"samples": 0, "blend": run.loader.blend}
    resume.save(run, wait=True)


def test_another_tuning_is_another_run(corpus: Path, tmp_path: Path) -> None:
    from megalm.checkpoint import manifest as manifests
    from megalm.training import resume
    from megalm.training.config import RunConfig
    from megalm.training.plan import plan

    start(tree_in(corpus, tmp_path / "run", "lora", "one rank"), "one rank")
    manifest = manifests.read(tmp_path / "run" / "checkpoints" / "step-8")

    def check(method: str, **keys: Any) -> None:
        tree = tree_in(corpus, tmp_path / "run", method, "one rank")
        tree["tuning"] = tree["tuning"] | keys
        resume.check(manifest, plan(RunConfig.model_validate(tree), 1), "step-8")

    check("lora", layer_decay=0.5)
    with pytest.raises(MegalmError, match="trained with tuning.rank=8 and the config says 4: other parameters"):
        check("lora", rank=4)
    with pytest.raises(MegalmError, match="tuning.method=lora"):
        check("dora")


def saved_sizes(tree: dict[str, Any]) -> tuple[int, int, int]:
    """Of a run on this rank: bytes that a checkpoint is said to take, bytes of its tensors' files, bytes of all copies
    that this rank keeps of them."""
    found = []

    def look(run: Any) -> None:
        found.append(run)

    train_run(tree, sabotage=look)
    [run] = found
    files = sum(path.stat().st_size for path in (run.directory / "checkpoints" / "step-8").glob("*.safetensors"))
    return run.checkpoint_bytes, files, 4 * run.saver._numbers


@pytest.mark.parametrize("tuning", [{}, {"method": "lora"}, {"freeze": ["embedding.*", "blocks.0.*"]}], ids=str)
def test_what_is_not_trained_takes_a_third_of_the_room(tuning: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    tree = tree_of(corpus, tmp_path / "run", tuning=tuning)
    [(needed, files, copies)] = run_ranks(1, saved_sizes, tree)
    assert needed == copies and needed <= files < needed + 30_000, "names and shapes stand in the files too"
