"""Heads of classes: every layout has one process's losses, norms and predictions; and Hugging Face Trainer's losses."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.training.config import RunConfig
from tests.distributed.ranks import Pool, run_ranks
from tests.distributed.reference import labelled
from tests.distributed.test_trainer import LOSS, trainer_settings
from tests.distributed.training import config, global_batch, join, micro_batches

STEPS, RATE = 3, 3e-3
HEADS = {"sequence_classification": 5, "token_classification": 7, "question_answering": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2, ZeRO 1": {"zero": 1},
    "data 2, ZeRO 2": {"zero": 2},
    "data 2, ZeRO 3": {"zero": 3},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence parallel": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline": 2},
    "pipeline 2, DualPipeV": {"pipeline": 2, "pipeline_schedule": "dualpipev"},
}
Outcome = tuple[list[tuple[float, float]], tuple[float, int], dict[int, np.ndarray]]


def run_of(head: str, **parallel: Any) -> RunConfig:
    # EPS: a gradient that is zero but for roundings (that of a span's biases) would else move weights as it likes.
    return config(
        model={"head": head, "num_labels": HEADS[head], "num_layers": 2},
        data={"attend_across_documents": False},
        train={"micro_batch_size": 4 if parallel.get("pipeline_schedule") else 8},
        optimizer={"eps": 1e-3},
        parallel=parallel | {"allow_unproved": True},
    )


def batches(step: int, run: RunConfig, rank: int, layout: Any) -> list[Any]:
    """Made-up labels for the head, of both segments of each row."""
    from megalm.data.batch import Batch
    from megalm.training.loop import tensors

    found = []
    for (tokens, segments, positions, ids), (labels, mask) in micro_batches(step, run, rank, layout):
        arrays = (each.numpy() for each in (tokens, labels, mask, segments, positions, ids))
        found.append(tensors(labelled(Batch(*arrays), run.model)))
    return found


def outcome(run: RunConfig, plant: Callable[[], None] | None = None) -> Outcome:
    """(loss, gradient norm) of some steps; then held-out loss and predictions. One row of the latter is padding."""
    from megalm.training.build import build_engine

    if plant:
        plant()
    joined = join(run)
    engine, _ = build_engine(run, joined, torch.device("cpu"), lambda norm: True)
    curve = []
    for step in range(STEPS):
        result = engine.step(batches(step, run, joined.data_rank, joined.layout), RATE)
        curve.append((result.loss, result.grad_norm))
    held_out = batches(9, run, joined.data_rank, joined.layout)
    for (_, _, _, ids), _ in held_out:
        ids[ids == 9 * run.train.global_batch_size] = -1
    return curve, engine.evaluate(held_out), engine.predict(held_out)


def distance(found: Outcome, wanted: Outcome) -> float:
    """The largest, of any number."""
    (curve, held_out, said), (their_curve, their_held_out, expected) = found, wanted
    assert list(said) == list(expected)
    rows = [(said[sample] - expected[sample]) for sample in expected]
    each = [np.abs(np.array(curve) - np.array(their_curve)).max(), abs(held_out[0] - their_held_out[0])]
    assert held_out[1] == their_held_out[1]
    return max(*each, *(np.abs(row).max() for row in rows))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


@cache
def alone(head: str) -> Outcome:
    [found] = run_ranks(1, outcome, run_of(head))
    return found


@pytest.mark.parametrize(
    ("head", "layout"),
    [
        *(("token_classification", layout) for layout in LAYOUTS),
        *(("question_answering", layout) for layout in ("tensor 2, sequence parallel", "pipeline 2")),
        ("sequence_classification", "tensor 2, sequence parallel"),
    ],
)
def test_layouts_agree(head: str, layout: str, ranks: Pool) -> None:
    main, other = ranks.run(outcome, run_of(head, **LAYOUTS[layout]))
    assert len(main[2]) == config().train.global_batch_size - 1
    assert other[2] == {}
    assert distance(main, alone(head)) < 1e-5


def gradients_summed_over_copies() -> None:
    """The gradient of what every rank computes alike is taken for a part of a sum."""
    from megalm.parallel.tensor import TensorParallelLayers

    TensorParallelLayers.collect = TensorParallelLayers.enter  # type: ignore[method-assign]


def gradients_left_in_parts() -> None:
    """The head's weight keeps the gradient of this rank's tokens."""
    from megalm.models.decoder import Classifier
    from megalm.parallel.tensor import TensorParallelLayers

    right = Classifier.forward

    def wrong(self: Any, stream: Any) -> Any:
        replicated = TensorParallelLayers.replicated
        TensorParallelLayers.replicated = lambda self, parameter: parameter  # type: ignore[method-assign]
        try:
            return right(self, stream)
        finally:
            TensorParallelLayers.replicated = replicated  # type: ignore[method-assign]

    Classifier.forward = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("plant", [gradients_summed_over_copies, gradients_left_in_parts])
def test_a_planted_bug_is_seen(plant: Callable[[], None]) -> None:
    run = run_of("token_classification", **LAYOUTS["tensor 2, sequence parallel"])
    main, _ = run_ranks(2, outcome, run, plant)
    assert distance(main, alone("token_classification")) > 1e-3


# ---- Hugging Face Trainer ----

TRAINER_STEPS = 20


def ends(run: RunConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [batch, seq] without the id of padding, classes [batch])."""
    tokens, _, _ = global_batch(step, run)
    return np.maximum(tokens[:, :-1], 1), tokens[:, -1] % HEADS["sequence_classification"]


def trainer_run() -> RunConfig:
    return config(
        model={"num_layers": 2, "head": "sequence_classification", "num_labels": HEADS["sequence_classification"]},
        train={"micro_batch_size": 4},
        optimizer={"learning_rate": RATE, "weight_decay": 0.3, "gradient_clipping": 1.0},
    )


def megalm_losses(run: RunConfig) -> list[float]:
    from megalm.training.build import build_engine

    joined = join(run)
    engine, _ = build_engine(run, joined, torch.device("cpu"), lambda norm: True)
    losses = []
    for step in range(TRAINER_STEPS):
        tokens, classes = (torch.from_numpy(each) for each in ends(run, step))
        batches = []
        for rows in torch.arange(len(tokens)).split(run.train.micro_batch_size):
            ids = tokens[rows]
            places = torch.arange(ids.shape[1]).repeat(len(rows), 1)
            mask = (places == ids.shape[1] - 1).float()
            labels = classes[rows][:, None].repeat(1, ids.shape[1])
            batches.append(((ids, torch.zeros_like(ids), places, rows), (labels, mask)))
        losses.append(engine.step(batches, RATE).loss)
    return losses


def trainer_losses(run: RunConfig, folder: Path, decay: float) -> list[float]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    torch.set_num_threads(1)
    import transformers

    from megalm.convert import architectures
    from megalm.models.decoder import build_model, decoder
    from megalm.nn.layers import Layers
    from tests.models.test_decoder_parity import theirs_from_ours

    architecture = architectures.of_model(run.model)
    described = architecture.write(run.model) | {"pad_token_id": 0}
    described |= {"problem_type": "single_label_classification"}
    theirs = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**described))
    weights = build_model(decoder(run.model, Layers(), seed=run.run.seed), run.run.seed).named_weights()
    theirs.load_state_dict(theirs_from_ours({name: w.detach() for name, w in weights.items()}, run.model, "llama"))
    rows = [
        {"input_ids": torch.from_numpy(ids), "labels": int(label)}
        for step in range(TRAINER_STEPS)
        for ids, label in zip(*ends(run, step), strict=True)
    ]
    # Over several micro-batches transformers 5.23 adds up the means of this head's losses.
    size = run.train.global_batch_size
    settings = trainer_settings(
        run, folder, max_steps=TRAINER_STEPS, per_device_train_batch_size=size, learning_rate=RATE, weight_decay=decay,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(theirs, settings, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_twenty_steps_of_a_classifier_are_trainers(tmp_path: Path) -> None:
    run = trainer_run()
    with Pool(1) as pool:
        [ours] = pool.run(megalm_losses, run)
        [theirs] = pool.run(trainer_losses, run, tmp_path, run.optimizer.weight_decay)
        [other] = pool.run(trainer_losses, run, tmp_path, run.optimizer.weight_decay + 0.05)
    assert np.abs(np.array(ours) / np.array(theirs) - 1).max() < LOSS
    assert np.abs(np.array(ours) / np.array(other) - 1).max() > 3 * LOSS
