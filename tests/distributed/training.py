"""What ranks do in the tests of this folder: train a tiny model on made-up batches, and report."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megalm.layout import Layout
from megalm.training.config import RunConfig

STEPS = 20
VOCAB = 101  # neither a multiple of the tensor degrees nor of the padding


def config(**sections: dict[str, Any]) -> RunConfig:
    """A tiny run; keyword arguments update its sections."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"directory": "unused"},
        "data": {"sources": [{"path": "unused"}], "tokenizer": "unused"},
        "model": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_layers": 4,
            "vocab_size": VOCAB,
            "pad_vocab_to_multiple_of": 8,
        },
        "train": {
            "steps": STEPS,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "sequence_length": 16,
            "precision": "fp32",
        },
        "optimizer": {"learning_rate": 1e-3},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return RunConfig.model_validate(tree)


def global_batch(step: int, run: RunConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [batch, seq + 1], loss mask [batch, seq], sample ids [batch]): ragged masks, whole rows empty."""
    size, length = run.train.global_batch_size, run.train.sequence_length
    random = np.random.default_rng(step)
    tokens = np.minimum(random.zipf(1.3, (size, length + 1)), VOCAB - 1).astype(np.int64)
    mask = (random.random((size, length)) < 0.8).astype(np.float32)
    mask[step % size] = 0.0
    mask[:, : step % 3] = 0.0
    return tokens, mask, np.arange(size) + step * size


def micro_batches(step: int, run: RunConfig, rank: int, layout: Layout) -> list[Any]:
    """The share of data-parallel rank `rank`, cut as the loader cuts it. Two segments a row."""
    tokens, mask, ids = (torch.from_numpy(a) for a in global_batch(step, run))
    length, micro = run.train.sequence_length, run.train.micro_batch_size
    rows = range(rank, run.train.global_batch_size, layout.data)
    batches = []
    for start in range(0, len(rows), micro):
        here = list(rows[start : start + micro])
        place = torch.arange(length).repeat(micro, 1)
        segments = (place >= length // 3).long()
        positions = place - segments * (length // 3)
        if run.data.attend_across_documents:
            segments, positions = torch.zeros_like(place), place
        inputs = tokens[here, :-1].contiguous(), segments, positions, ids[here]
        batches.append((inputs, (tokens[here, 1:].contiguous(), mask[here])))
    return batches


def join(run: RunConfig) -> Any:
    """This rank's process groups."""
    from megalm.parallel import device, groups

    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    here = device.local(device.choose("cpu"))
    groups.start(here)
    layout = Layout.of(groups.world_size(), tensor=run.parallel.tensor, pipeline=run.parallel.pipeline)
    return groups.create(layout)


def engine_curve(
    run: RunConfig, steps: int = STEPS, sabotage: Callable[[], None] | None = None
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step in the engine of this rank's layout. sabotage: breaks something first."""
    from megalm.training.build import build_engine

    if sabotage:
        sabotage()
    joined = join(run)
    engine, _ = build_engine(run, joined, torch.device("cpu"), lambda norm: True)
    curve = []
    for step in range(steps):
        batches = micro_batches(step, run, joined.data_rank, joined.layout)
        result = engine.step(batches, run.optimizer.learning_rate)
        assert result.applied and result.trained_tokens == int(global_batch(step, run)[1].sum())
        curve.append((result.loss, result.grad_norm))
    return curve
