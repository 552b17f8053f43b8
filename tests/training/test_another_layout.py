"""A run goes on under any other layout: the next samples, the same weights and moments, the curve of the one before."""

import itertools
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import sabotage
from tests.distributed.ranks import run_ranks
from tests.training.conftest import tree_of
from tests.training.runs import curve, train_run, whole_state

GPT = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "tie_word_embeddings": True,
} | dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), True)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"zero": 0}),
    "data 2, ZeRO 1": (2, {"zero": 1}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, ZeRO 0": (2, {"tensor": 2, "sequence_parallel": True, "zero": 0}),
    "data 2, ZeRO 3": (2, {"zero": 3}),
    "dualpipev 2": (2, {"pipeline": 2, "pipeline_schedule": "dualpipev"}),
    "tensor 4": (4, {"tensor": 4}),
    "data 4, ZeRO 2": (4, {"zero": 2}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2 x data 2, ZeRO 3": (4, {"tensor": 2, "zero": 3}),
}
"""Fewer key-value heads than ranks at tensor 4, and the ends of a pipeline that share a table."""
NAMES = list(LAYOUTS)
RING = [(name, NAMES[(place + 1) % len(NAMES)]) for place, name in enumerate(NAMES)]
"""Each layout is left once and reached once."""
PAIRS = list(itertools.permutations(NAMES, 2)) if os.environ.get("MEGALM_ALL_PAIRS") else RING
"""make test-matrix asks for all 90."""
LOSS, NORM = 1e-5, 1e-4
"""Of fp32 sums in another order, relative, over 20 steps at most."""


def tree_in(corpus: Path, directory: Path, name: str, precision: str = "fp32") -> dict[str, Any]:
    tree = tree_of(corpus, directory, parallel=LAYOUTS[name][1], model={**GPT, "hidden_size": 32})
    tree["train"]["precision"] = precision
    if precision != "fp32" and LAYOUTS[name][1].get("zero") == 0:
        tree["parallel"] = tree["parallel"] | {"zero": 1}
    return tree


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Callable[[str, str], dict[str, Any]]:
    """An uninterrupted run of eight steps in a layout and precision, with a checkpoint after four; made once."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def run(name: str, precision: str) -> dict[str, Any]:
        if (name, precision) not in made:
            tree = tree_in(corpus, corpus / f"{name} {precision}", name, precision)
            start(name, tree)
            made[name, precision] = tree
        return made[name, precision]

    return run


def start(name: str, tree: dict[str, Any], plant: Callable[[Any], None] | None = None) -> None:
    ranks = LAYOUTS[name][0]
    work = (
        partial(_in_fp16, plant=plant) if tree["train"]["precision"] == "fp16" else partial(train_run, sabotage=plant)
    )
    assert run_ranks(ranks, work, tree) == [0] * ranks


def _in_fp16(tree: dict[str, Any], plant: Callable[[Any], None] | None) -> int:
    sabotage.pretend_fp16()
    return train_run(tree, plant)


def save_at_once(run: Any) -> None:
    """Write the checkpoint that was just read, from the layout that read it."""
    from megalm.training import resume

    run.data_state = {"samples": run.step * run.config.train.global_batch_size, "blend": run.loader.blend}
    resume.save(run, wait=True)


def lose_a_moment(run: Any) -> None:
    """A bug to be caught: one tensor's second moment is not carried over."""
    next(iter(run.engine.pieces(run.layer_names, owned=False))).tensors["exp_avg_sq"].zero_()
    save_at_once(run)


def move(before: dict[str, Any], after: dict[str, Any], name: str, plant: Callable[[Any], None] = save_at_once) -> None:
    """Continue a run's fourth step in a folder and a layout of its own."""
    source, target = Path(before["run"]["directory"]), Path(after["run"]["directory"])
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-8")
    start(name, after, plant)


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys() and len(ours) > 100
    return all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def worst(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    pairs = np.array([(a[key], b[key]) for a, b in zip(ours, theirs, strict=True)])
    return float(np.abs(pairs[:, 0] / pairs[:, 1] - 1).max())


def degrees(name: str) -> tuple[int, ...]:
    """What a checkpoint's writer and reader are told apart by."""
    ranks, parallel = LAYOUTS[name]
    return ranks, parallel.get("pipeline", 1), parallel.get("tensor", 1)


def check(trained: Any, corpus: Path, folder: Path, before: str, after: str, precision: str, tolerance: float) -> None:
    whole = trained(before, precision)
    moved = tree_in(corpus, folder / "moved", after, precision)
    move(whole, moved, after)
    assert same_tensors(whole_state(moved, 4), whole_state(whole, 4)), "weights or moments changed on the way"
    ours, theirs = curve(moved), curve(whole)
    for key in ("step", "samples", "tokens", "lr", "applied"):
        assert [record[key] for record in ours] == [record[key] for record in theirs]
    loss, norm = worst(ours, theirs, "loss"), worst(ours, theirs, "grad_norm")
    assert loss < tolerance and norm < 10 * tolerance, f"loss off by {loss:.1e}, gradient norm by {norm:.1e}"
    said = (folder / "moved" / "said.txt").read_text()
    assert ("step-4 was written by " in said) == (degrees(before) != degrees(after))


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda name: name)
def test_from_one_layout_to_another(
    trained: Callable[..., Any], corpus: Path, tmp_path: Path, before: str, after: str
) -> None:
    check(trained, corpus, tmp_path, before, after, "fp32", LOSS)


@pytest.mark.parametrize(
    ("before", "after", "precision"),
    [
        ("data 2, ZeRO 3", "tensor 2 x pipeline 2", "bf16"),
        ("tensor 2 x pipeline 2", "one rank", "bf16"),
        ("one rank", "data 2, ZeRO 3", "fp16"),
        ("data 2, ZeRO 3", "pipeline 2", "fp16"),
    ],
)
def test_in_half_precision(
    trained: Callable[..., Any], corpus: Path, tmp_path: Path, before: str, after: str, precision: str
) -> None:
    # A bf16 product has 8 significant bits. Sums in another order move an fp32 master weight by 1e-7, which now and
    # then flips the rounding of its bf16 copy: curves part by some 1e-4 of the loss.
    check(trained, corpus, tmp_path, before, after, precision, 1e-3)


def test_a_lost_moment_is_seen(trained: Callable[..., Any], corpus: Path, tmp_path: Path) -> None:
    """Negative control."""
    whole = trained("one rank", "fp32")
    moved = tree_in(corpus, tmp_path / "moved", "pipeline 2")
    move(whole, moved, "pipeline 2", lose_a_moment)
    assert not same_tensors(whole_state(moved, 4), whole_state(whole, 4))
    assert worst(curve(moved), curve(whole), "loss") > LOSS
