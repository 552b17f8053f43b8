"""Whole runs: they end where they should, resume bitwise, and survive what befalls them."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.errors import MegalmError
from tests.distributed.ranks import RankFailed, run_ranks
from tests.training.runs import CrashAt, NaNAt, SignalAt, curve, state, train_run

Settings = Callable[..., dict[str, Any]]

LAYOUTS = {
    "one rank, ZeRO 0": (1, {"parallel": {"zero": 0}}),
    "one rank, bf16": (1, {"train": {"precision": "bf16"}}),
    "data 2, ZeRO 2": (2, {"parallel": {"zero": 2}}),
    "data 2, ZeRO 3, bf16": (2, {"parallel": {"zero": 3}, "train": {"precision": "bf16"}}),
    "tensor 2 x pipeline 2": (4, {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}}),
    "dualpipev": (2, {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"}}),
}


def merged(tree: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return tree | {key: tree.get(key, {}) | section for key, section in sections.items()}


def tree_of(settings: Settings, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    tree = settings(name, **{key: value for key, value in layout.items() if key != "train"})
    return merged(tree, train=layout.get("train", {}))


def test_a_run_leaves_what_it_promises(settings: Settings, corpus: Path) -> None:
    tree = settings()
    assert run_ranks(1, partial(train_run, picture=True), tree) == [0]
    directory = Path(tree["run"]["directory"])
    records = curve(tree)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["tokens"] for record in records] == [512 * step for step in range(1, 9)]
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["loss"] == pytest.approx(math.log(600), rel=0.02), "an untrained model guesses"
    assert [record["step"] for record in records if "held_out" in record] == [4, 8]
    (nats,), (bits,) = records[-1]["held_out"].values(), records[-1]["bits_per_byte"].values()
    assert 1 < nats / math.log(2) / bits < 5, "bytes per token of English text in 600 tokens"
    assert records[0]["lr"] == pytest.approx(5e-4) and records[1]["lr"] == pytest.approx(1e-3)
    assert checkpoints.steps(directory / "checkpoints") == [4, 8]
    assert (directory / "checkpoints" / "latest").read_text().strip() == "step-8"
    assert (directory / "loss.png").stat().st_size > 10_000
    assert "learning_rate: 0.001" in (directory / "config.yaml").read_text()
    # A finished run that is started again says so, changes nothing and succeeds.
    before = (directory / "metrics.jsonl").read_bytes()
    assert run_ranks(1, train_run, tree) == [0]
    assert (directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_crashed_run_resumes_bitwise(settings: Settings, name: str) -> None:
    ranks, layout = LAYOUTS[name]
    whole, broken = tree_of(settings, "whole", layout), tree_of(settings, "broken", layout)
    assert set(run_ranks(ranks, train_run, whole)) == {0}
    with pytest.raises(RankFailed, match="planted crash"):
        run_ranks(ranks, partial(train_run, sabotage=CrashAt(6)), broken)
    assert [r["step"] for r in curve(broken)] == list(range(1, 7)), "it crashed in step 7"
    assert set(run_ranks(ranks, train_run, broken)) == {0}
    assert curve(broken) == curve(whole)
    expected, found = state(whole, 8), state(broken, 8)
    assert expected.keys() == found.keys() and len(expected) > 20
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), f"{key} differs after resuming"


def test_the_comparison_sees_a_lost_step(settings: Settings) -> None:
    """Negative control: a run whose loader starts one step late is not the same run."""
    whole, late = settings("whole"), settings("late")
    run_ranks(1, train_run, whole)
    run_ranks(1, partial(train_run, sabotage=_skip_a_step), late)
    assert curve(late) != curve(whole)


def _skip_a_step(run: Any) -> None:
    next(run.loader)


@pytest.mark.parametrize(
    "numbers",
    # The last is what a rank gets when Ctrl-C is typed at a launcher: the terminal's signal, then the launcher's.
    [[signal.SIGTERM], [signal.SIGUSR1], [signal.SIGINT, signal.SIGTERM]],
)
def test_a_signal_to_one_rank_saves_and_stops_all(settings: Settings, numbers: list[int]) -> None:
    tree, whole = settings("stopped"), settings("whole")
    stopping = partial(train_run, sabotage=SignalAt(numbers, step=5, rank=1))
    assert run_ranks(2, stopping, tree) == [75, 75]
    assert checkpoints.steps(Path(tree["run"]["directory"]) / "checkpoints") == [4, 6]
    assert run_ranks(2, train_run, tree) == [0, 0]
    run_ranks(2, train_run, whole)
    # The stop itself is on record; the curve is the uninterrupted one.
    assert curve(tree) == curve(whole)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {"zero": 0}), (2, {"zero": 1}), (2, {"zero": 2}), (2, {"zero": 3}), (2, {"pipeline": 2}), (2, {"tensor": 2})],
)
def test_a_step_that_is_not_a_number_is_skipped(settings: Settings, ranks: int, parallel: dict[str, Any]) -> None:
    tree = merged(settings(parallel=parallel), train={"on_nan": "skip"}, checkpoint={"every": 1})
    broken = partial(train_run, sabotage=NaNAt(2))
    assert set(run_ranks(ranks, broken, tree)) == {0}
    records = curve(tree)
    assert [record["applied"] for record in records] == [True, True, False, True, True, True, True, True]
    assert records[2]["loss"] is None and records[2]["anomalies"] == 1
    before, after, later = (state(tree, step) for step in (2, 3, 4))
    weights = [key for key in before if "/weight/" in key]
    assert all(torch.equal(before[key], after[key]) for key in weights), "the skipped step moved the weights"
    assert not all(torch.equal(after[key], later[key]) for key in weights)
    assert all(torch.isfinite(tensor).all() for tensor in later.values() if tensor.is_floating_point())


def test_a_bf16_step_that_is_not_a_number_is_skipped(settings: Settings) -> None:
    tree = merged(settings(), train={"on_nan": "skip", "precision": "bf16"})
    assert run_ranks(1, partial(train_run, sabotage=NaNAt(2)), tree) == [0]
    assert [record["applied"] for record in curve(tree)].count(False) == 1


def test_a_run_stops_at_a_step_that_is_not_a_number(settings: Settings) -> None:
    tree = settings()
    assert run_ranks(1, partial(train_run, sabotage=NaNAt(5)), tree) == [3]
    assert [record["step"] for record in curve(tree)] == list(range(1, 7))
    assert checkpoints.steps(Path(tree["run"]["directory"]) / "checkpoints") == [4]
    said = (Path(tree["run"]["directory"]) / "said.txt").read_text()
    assert re.search(r"step 6: .* \(not finite\); stopped before the update \(train.on_nan=stop\)", said)


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_stops_saves_nothing_behind_what_stopped_it(settings: Settings, step: int) -> None:
    """Neither at a step that is saved nor at the last one: started again unchanged, it stops again."""
    tree = settings()
    for started in (0, step - 4):
        assert run_ranks(1, partial(train_run, sabotage=NaNAt(step - 1 - started)), tree) == [3]
        assert checkpoints.steps(Path(tree["run"]["directory"]) / "checkpoints") == list(range(4, step, 4))
    assert run_ranks(1, train_run, tree) == [0]


def test_a_spike_rolls_back_and_goes_past_its_samples(settings: Settings) -> None:
    tree = merged(settings(), train={"steps": 30, "on_spike": "rollback"}, schedule={"total_steps": 30})
    assert run_ranks(2, partial(train_run, sabotage=NaNAt(25, factor=1e4)), tree) == [0, 0]
    records = curve(tree)
    assert [record["step"] for record in records] == list(range(1, 31)), "the curve is one line"
    manifest = json.loads((Path(tree["run"]["directory"]) / "checkpoints/step-30/manifest.json").read_text())
    # Step 26 was taken back to step 24: its samples and those of step 25 were read, and not read again.
    assert manifest["data"]["samples"] == 16 * 32
    assert manifest["trainer"]["Anomalies"]["anomalies"] == 1


class SaveAfterRollback:
    """Write the checkpoint anew from what a rollback left in the engine."""

    def __init__(self) -> None:
        self.nan = NaNAt(5)

    def __call__(self, run: Any) -> None:
        from megalm.training import resume
        from megalm.training.callbacks import anomalies

        self.nan(run)
        right = anomalies.roll_back

        def roll_back(run: Any) -> int:
            step = right(run)
            state = run.data_state
            run.data_state = {"samples": 16 * step, "blend": run.loader.blend}
            if run.is_main:
                folder = resume.directory(run.config) / f"step-{step}"
                shutil.copytree(folder, run.directory / "kept")
            run.groups.barrier()
            resume.save(run, wait=True)
            run.data_state = state
            return step

        anomalies.roll_back = roll_back


@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (1, {"parallel": {"zero": 0}}),
        (2, {"parallel": {"zero": 2}}),
        (2, {"parallel": {"zero": 3}, "train": {"precision": "bf16"}}),
        (2, {"parallel": {"pipeline": 2}, "train": {"precision": "bf16"}}),
    ],
)
def test_a_rollback_brings_weights_and_moments_back(
    settings: Settings, tmp_path: Path, ranks: int, sections: dict[str, Any]
) -> None:
    tree = merged(settings(), train={"on_nan": "rollback"}, **{k: v for k, v in sections.items() if k != "train"})
    tree = merged(tree, train=sections.get("train", {}))
    assert run_ranks(ranks, partial(train_run, sabotage=SaveAfterRollback()), tree) == [0] * ranks
    kept = {
        key: tensor for path in (tmp_path / "run" / "kept").glob("*.safetensors") for key, tensor in load(path).items()
    }
    back = state(tree, 4)
    assert kept.keys() == back.keys() and all(torch.equal(tensor, back[key]) for key, tensor in kept.items())
    assert [record["step"] for record in curve(tree)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layers": 5}}, r"was trained with model.num_layers=4 and the config says 5"),
        ({"run": {"seed": 7}}, r"was trained with run.seed=1234 and the config says 7"),
        ({"train": {"global_batch_size": 32}}, r"train.global_batch_size=16 and the config says 32"),
        ({"data": {"shuffle": False}}, r"data.shuffle is no longer what the run was started with"),
        ({"checkpoint": {"resume": "never"}}, r"already holds a run \(at step-8\)"),
    ],
)
def test_a_changed_run_is_not_resumed(settings: Settings, corpus: Path, change: Any, message: str) -> None:
    tree = settings()
    _train_once(tree, corpus)
    with pytest.raises(RankFailed, match=message):
        run_ranks(1, train_run, merged(tree, **change))


def test_a_change_that_is_allowed(settings: Settings, corpus: Path) -> None:
    """Another batch goes on with the next sample; what orders the samples lets them start anew, and the log says so."""
    tree = settings()
    _train_once(tree, corpus)
    shutil.rmtree(Path(tree["run"]["directory"]) / "checkpoints" / "step-8")
    allow = {"checkpoint": {"allow_changes": ["train.global_batch_size"]}}
    larger = merged(tree, train={"global_batch_size": 32}, **allow)
    assert run_ranks(1, train_run, larger) == [0]
    assert [record["samples"] for record in curve(larger)] == [16, 32, 48, 64, 96, 128, 160, 192]

    again = settings("again")
    _train_once(again, corpus)
    shutil.rmtree(Path(again["run"]["directory"]) / "checkpoints" / "step-8")
    changed = merged(again, run={"seed": 7}, checkpoint={"allow_changes": ["run.seed"]})
    assert run_ranks(1, train_run, changed) == [0]
    assert [record["samples"] for record in curve(changed)] == [16, 32, 48, 64, 16, 32, 48, 64]
    said = (Path(again["run"]["directory"]) / "said.txt").read_text()
    assert "changed since step-4: run.seed: 1234 -> 7" in said
    # Started once more, nothing is left to allow.
    assert run_ranks(1, train_run, merged(again, run={"seed": 7})) == [0]


def _train_once(tree: dict[str, Any], corpus: Path) -> None:
    """One finished run serves every refusal."""
    source = corpus / "finished"
    if not source.exists():
        first = merged(tree, run={"directory": str(source)})
        run_ranks(1, train_run, first)
    shutil.copytree(source, tree["run"]["directory"])


def test_a_byte_in_any_file_of_a_checkpoint(settings: Settings, corpus: Path) -> None:
    tree = settings()
    _train_once(tree, corpus)
    folder = Path(tree["run"]["directory"]) / "checkpoints" / "step-8"
    victims = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(victims) == 3, "weights, moments and the manifest"
    for victim in victims:
        content = victim.read_bytes()
        altered = bytearray(content)
        altered[-40] ^= 1
        victim.write_bytes(altered)
        with pytest.raises(RankFailed, match=rf"step-8 is damaged: {victim.name} .*; use .*step-4 instead"):
            run_ranks(1, train_run, tree)
        victim.write_bytes(content)
    victims[0].unlink()
    with pytest.raises(RankFailed, match=rf"step-8 is damaged: {victims[0].name} is missing"):
        run_ranks(1, train_run, tree)
    # What is offered works, and the same command works again.
    back = merged(tree, checkpoint={"resume": str(folder.with_name("step-4"))})
    assert run_ranks(1, train_run, back) == [0]
    assert run_ranks(1, train_run, back) == [0]
    assert checkpoints.steps(folder.parent) == [4, 8] and (folder.parent / "left-step-8").is_dir()


def test_a_key_that_came_later_has_its_default(settings: Settings, corpus: Path) -> None:
    tree = settings()
    _train_once(tree, corpus)
    folder = Path(tree["run"]["directory"]) / "checkpoints" / "step-8"
    manifest = manifests.read(folder)
    older = {key: value for key, value in manifest.config["model"].items() if key != "parallel_residual"}
    manifests.write(folder, replace(manifest, config=manifest.config | {"model": older}))
    assert run_ranks(1, train_run, tree) == [0]
    with pytest.raises(RankFailed, match="was trained with model.parallel_residual=False and the config says True"):
        run_ranks(1, train_run, merged(tree, model={"parallel_residual": True}))


def test_a_table_of_positions_keeps_its_rows(settings: Settings) -> None:
    tree = settings(model={"position": "learned", "hidden_size": 32, "max_position_embeddings": 64})
    assert run_ranks(1, train_run, merged(tree, train={"steps": 4})) == [0]
    longer = merged(
        tree,
        model={"max_position_embeddings": 128},
        checkpoint={"allow_changes": ["model.max_position_embeddings"]},
    )
    with pytest.raises(RankFailed, match=r"holds positions.weight as \[64, 32\] and the config makes it \[128, 32\]"):
        run_ranks(1, train_run, longer)


def test_a_rollback_without_a_checkpoint_says_so(settings: Settings) -> None:
    tree = merged(settings(), train={"on_nan": "rollback"}, checkpoint={"every": 0})
    with pytest.raises(RankFailed, match=MegalmError.__name__) as caught:
        run_ranks(1, partial(train_run, sabotage=NaNAt(2)), tree)
    assert "nothing to roll back to" in str(caught.value)
