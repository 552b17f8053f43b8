"""Fine-tuning runs: Trainer's losses, packing without contamination, and the same samples after a kill."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint import manifest as manifests
from megalm.data.batch import Batch
from megalm.data.examples import Example, ExampleSet, Rows
from megalm.data.loader import Loader
from megalm.errors import MegalmError
from megalm.models.decoder import build_model, decoder
from megalm.nn.layers import Layers
from megalm.parallel.proved import features
from megalm.tokenizer.base import Tokenizer
from megalm.training import resume
from megalm.training.config import RunConfig
from megalm.training.loop import tensors
from megalm.training.plan import plan
from tests.distributed import sabotage
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.test_trainer import LOSS, NORM, RUN, Curve, rate, trainer_curves, worst
from tests.distributed.training import STEPS, config, join
from tests.sft.conftest import write_rows
from tests.training.runs import SignalAt, curve, train_run

LENGTH = 128


def tree_of(folder: Path, tokenizer_folder: Path, conversations: list[Any], **sections: Any) -> dict[str, Any]:
    """The tree of a tiny run over the conversations; keyword arguments update its sections."""
    rows = write_rows(folder / "rows.jsonl", [{"messages": messages} for messages in conversations])
    made: dict[str, Any] = {
        "run": {"directory": str(folder / "run")},
        "task": {},
        "data": {
            "sources": [{"path": str(rows)}],
            "held_out": [{"path": str(rows)}],
            "tokenizer": str(tokenizer_folder),
        },
        "model": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": 2},
        "train": {
            "steps": 8,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "sequence_length": LENGTH,
            "precision": "fp32",
        },
        "checkpoint": {"every": 3, "asynchronous": False},
        "logging": {"progress_bar": "off"},
    }
    for key, section in sections.items():
        made[key] = made[key] | section if isinstance(made.get(key), dict) else section
    return made


# ---- Trainer's losses ----


def rows_of(run: RunConfig, folder: Path, arrangement: Any = "padded") -> Rows:
    return Rows(
        [ExampleSet.load(folder)],
        [1.0],
        sequence_length=LENGTH,
        pad_id=0,
        arrangement=arrangement,
        global_batch_size=run.train.global_batch_size,
        facts={"tokenizer": ""},
    )


def batches(run: RunConfig, folder: Path, rank: int, size: int, micro: int) -> list[list[Batch]]:
    """The micro-batches of every step, as a run's loader gives them."""
    sizes = {"global_batch_size": run.train.global_batch_size, "micro_batch_size": micro}
    with Loader(rows_of(run, folder), rank=rank, size=size, seed=0, prefetch=0, **sizes) as loader:
        return [next(loader)[0] for _ in range(STEPS)]


def trainer_rows(folder: Path, run: RunConfig) -> list[dict[str, torch.Tensor]]:
    """The same rows as Trainer wants them: ids that it shifts itself, -100 where nothing is trained."""
    made = []
    for [*rows] in batches(run, folder, 0, 1, 1):
        for batch in rows:
            size = int((batch.segment_ids[0] == 0).sum())
            ids, labels = np.zeros(LENGTH + 1, np.int64), np.full(LENGTH + 1, -100)
            ids[:size], ids[size] = batch.tokens[0, :size], batch.labels[0, size - 1]
            labels[1 : size + 1] = np.where(batch.loss_mask[0, :size], batch.labels[0, :size], -100)
            made.append({"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)})
    return made


def megalm_curve(run: RunConfig, folder: Path, plant: Callable[[], None] | None = None) -> Curve:
    from megalm.training.build import build_engine

    if plant:
        plant()
    joined = join(run)
    engine, _ = build_engine(run, joined, torch.device("cpu"), lambda norm: True)
    steps = batches(run, folder, joined.data_rank, joined.layout.data, run.train.micro_batch_size)
    results = [engine.step([tensors(batch) for batch in step], rate(n, run)) for n, step in enumerate(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def settings(tokenizer: Tokenizer, **sections: Any) -> RunConfig:
    model = {"num_layers": 2, "vocab_size": tokenizer.vocab_size}
    train = {"sequence_length": LENGTH, "micro_batch_size": 16} | sections.pop("train", {})
    return config(**RUN | {"model": model, "train": train, "task": {"arrangement": "padded"}} | sections)


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, tokenizer: Tokenizer, conversations: list[Any]
) -> Path:
    """The conversations as examples on disk."""
    from megalm.sft.open import keep_examples, open_task

    folder = tmp_path_factory.mktemp("kept")
    run = RunConfig.model_validate(tree_of(folder, tokenizer_folder, conversations))
    assert run.task
    task = open_task(run.task, run.data, tokenizer, LENGTH)
    return keep_examples(task, run.task, run.data.sources[0].path, tokenizer, LENGTH, folder)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, kept: Path, tokenizer: Tokenizer) -> dict[str, Curve]:
    """Trainer's curve for each of its splits."""
    curves: dict[str, Curve] = {}
    rows = partial(trainer_rows, kept)
    for ranks, sizes in {1: [16, 4], 2: [2]}.items():
        folder = tmp_path_factory.mktemp("trainer")
        each = run_ranks(ranks, trainer_curves, settings(tokenizer), sizes, folder, rows)[0]
        curves |= {f"{ranks} ranks, micro-batch {size}": curve for size, curve in zip(sizes, each)}
    return curves


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, micro-batch 16": (1, {}),
    "data 2, micro-batch 4": (2, {"train": {"micro_batch_size": 4}}),
    "data 4, micro-batch 1": (4, {"train": {"micro_batch_size": 1}, "parallel": {"zero": 2}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_equal_trainers(name: str, trainer: dict[str, Curve], kept: Path, tokenizer: Tokenizer) -> None:
    ranks, sections = LAYOUTS[name]
    ours = run_ranks(ranks, megalm_curve, settings(tokenizer, **sections), kept)[0]
    for split, reference in trainer.items():
        loss, norm = worst(ours, reference)
        assert loss < LOSS and norm < NORM, f"{name} and {split}: loss off by {loss:.1e}, gradient norm by {norm:.1e}"


def everything_is_trained() -> None:
    right = Rows.batch

    def batch(self: Rows, *given: Any) -> Batch:
        made = right(self, *given)
        made.loss_mask[made.segment_ids == 0] = 1.0
        return made

    Rows.batch = batch  # type: ignore[method-assign]


@pytest.mark.parametrize("plant", [sabotage.mean_of_micro_batch_means, everything_is_trained], ids=lambda f: f.__name__)
def test_planted_bugs_are_caught(
    plant: Callable[[], None], trainer: dict[str, Curve], kept: Path, tokenizer: Tokenizer
) -> None:
    run = settings(tokenizer, train={"micro_batch_size": 2})
    ours = run_ranks(1, partial(megalm_curve, plant=plant), run, kept)[0]
    for split, reference in trainer.items():
        loss, norm = worst(ours, reference)
        assert loss > LOSS or norm > NORM, f"{plant.__name__} went unseen beside {split}"


# ---- packing ----


def test_packed_logits_equal_those_of_each_alone(kept: Path, tokenizer: Tokenizer) -> None:
    run = settings(tokenizer)
    torch.manual_seed(0)
    model = build_model(decoder(run.model, Layers(), seed=0, segmented=True), seed=0).eval()
    examples = ExampleSet.load(kept)
    packed, alone = (rows_of(run, kept, arrangement) for arrangement in ("packed", "padded"))
    assert packed.corpora[0].samples < 0.8 * len(examples)

    @torch.no_grad()
    def logits(batch: Batch, **changes: np.ndarray) -> torch.Tensor:
        (ids, *rest), _ = tensors(Batch(**vars(batch) | changes))
        return model((ids, *rest))

    worst = {"right": 0.0, "one segment": 0.0, "positions go on": 0.0}
    for number in range(packed.corpora[0].samples):
        batch = packed.batch([(0, number)], np.zeros(1))
        places = packed.examples_in(number)
        found = {
            "right": logits(batch),
            "one segment": logits(batch, segment_ids=np.zeros_like(batch.segment_ids)),
            "positions go on": logits(batch, segment_ids=np.zeros_like(batch.segment_ids), positions=_counting(batch)),
        }
        for example, start, stop in places:
            expected = logits(alone.batch([(0, example)], np.zeros(1)))[: stop - start]
            for name, values in found.items():
                worst[name] = max(worst[name], (values[start:stop] - expected).abs().max().item())
    assert worst["right"] < 1e-5, worst
    assert worst["one segment"] > 1e-3 and worst["positions go on"] > 1e-3, "contamination is seen"


def _counting(batch: Batch) -> np.ndarray:
    return np.arange(batch.tokens.shape[1])[None]


def test_packed_rows_are_isolated_whatever_pretraining_does(
    tmp_path: Path, tokenizer_folder: Path, conversations: list[Any]
) -> None:
    tree = tree_of(tmp_path, tokenizer_folder, conversations)
    for arrangement, attend, apart in (("packed", True, True), ("packed", False, True), ("padded", False, False)):
        tree["task"]["arrangement"], tree["data"]["attend_across_documents"] = arrangement, attend
        planned = plan(RunConfig.model_validate(tree), 1)
        assert planned.config.segmented == apart
        assert features(planned.config, planned.layout)["documents"] == ("apart" if apart else "seen across")


# ---- runs ----


@pytest.mark.parametrize("arrangement", ["packed", "sorted"])
def test_a_killed_run_goes_on_at_another_layout(
    arrangement: str, tmp_path: Path, tokenizer_folder: Path, conversations: list[Any]
) -> None:
    task = {"task": {"arrangement": arrangement}}
    whole, broken, late = (
        tree_of(tmp_path, tokenizer_folder, conversations, run={"directory": str(tmp_path / name)}, **task)
        for name in ("whole", "broken", "late")
    )
    assert run_ranks(1, train_run, whole) == [0]
    with pytest.raises(RankFailed):
        run_ranks(1, partial(train_run, sabotage=SignalAt([signal.SIGKILL], step=5)), broken)
    assert [record["step"] for record in curve(broken)] == [1, 2, 3, 4, 5]
    broken["parallel"] = {"tensor": 2, "sequence_parallel": True, "zero": 1}
    assert run_ranks(4, train_run, broken) == [0] * 4
    run_ranks(1, partial(train_run, sabotage=_skip_a_step), late)
    expected, found, shifted = curve(whole), curve(broken), curve(late)
    assert [(r["step"], r["samples"], r["tokens"]) for r in found] == [
        (r["step"], r["samples"], r["tokens"]) for r in expected
    ]
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
    assert found[-1]["held_out"] == pytest.approx(expected[-1]["held_out"], rel=1e-5)
    assert [r["tokens"] for r in shifted] != [r["tokens"] for r in expected], "other samples are seen"
    said = (tmp_path / "broken" / "said.txt").read_text()
    assert " of 25 rows, " in said and "cut to 128 tokens: " in said

    manifest = manifests.read(tmp_path / "broken" / "checkpoints" / "step-8")
    for key, value in (("template", "qwen"), ("train_on", "all"), ("arrangement", "padded")):
        other = broken | {"task": task["task"] | {key: value}}
        with pytest.raises(MegalmError, match=f"was trained with task.{key}="):
            resume.check(manifest, plan(RunConfig.model_validate(other), 4), "step-8")
    resume.check(manifest, plan(RunConfig.model_validate(broken), 4), "step-8")


def _skip_a_step(run: Any) -> None:
    next(run.loader)


def test_wrong_rows_are_refused_before_anything_is_allocated(
    tmp_path: Path, tokenizer_folder: Path, conversations: list[Any]
) -> None:
    tree = tree_of(tmp_path, tokenizer_folder, conversations)
    write_rows(tmp_path / "rows.jsonl", [{"question": "x"}])
    with pytest.raises(MegalmError, match=r"no column messages, conversations or instruction: 1 \(line 1\)"):
        plan(RunConfig.model_validate(tree), 1)
    assert not (tmp_path / "run").exists()
    bare = RunConfig.model_validate(tree | {"data": tree["data"] | {"tokenizer": str(tmp_path / "nothing")}})
    with pytest.raises(MegalmError, match="there is no tokenizer"):
        plan(bare, 1)


def test_several_labels_travel_with_the_tokens() -> None:
    ones = np.ones(3, int)
    examples = ExampleSet.of([(Example(ones, np.eye(3, 5, dtype=int), ones), 0, 1)], ["f"])
    rows = Rows([examples], [1.0], sequence_length=4, pad_id=0, arrangement="packed", global_batch_size=1, facts={})
    _, (labels, _) = tensors(rows.batch([(0, 0), None], np.zeros(2)))
    assert labels.shape == (2, 4, 5) and labels.sum() == 3
