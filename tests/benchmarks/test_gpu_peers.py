"""All sides train the same model on the same text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F

from megalm.errors import MegalmError
from megalm.models.decoder import build_model, decoder
from megalm.nn.layers import Layers
from megalm.training.loop import tensors
from tests.benchmarks.scripts import FOLDER, script

cpu_training, gpu_measure, gpu_peers = map(script, ("cpu_training", "gpu_measure", "gpu_peers"))


def test_all_sides_train_the_same_model(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    command = [sys.executable, FOLDER / "gpu_peers.py", "--device", "cpu", "--preset", "tiny", "--precision", "fp32"]
    done = subprocess.run([*command, "--quick", "--output", output], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "figures mean nothing for a GPU" in done.stdout
    facts, found, ratios = [json.loads(line) for line in output.read_text().splitlines()]
    assert facts["benchmark"] == "peers"
    for side in gpu_peers.SIDES:
        losses = found[side]["losses"]
        assert len(losses) == 6 and len(found[side]["step_seconds"]) == 4, side
        assert losses[-1] < losses[0] - 0.05, "a curve that does not move tells nothing"
        assert losses == pytest.approx(found["megalm"]["losses"], rel=1e-4)
        assert f"megalm / {side} = " in done.stdout or side == "megalm"
    assert ratios["ratios"].keys() == {"trainer", "deepspeed"}


@pytest.mark.parametrize("preset", ["tiny", "124M"])
def test_transformers_model_is_megalms(preset: str) -> None:
    """Small, but of the preset's architecture: the same loss in training, which a dropout left on would move."""
    sizes = {"model.hidden_size": 64, "model.intermediate_size": 128, "model.num_attention_heads": 2,
             "model.num_layers": 2, "model.vocab_size": 512, "train.sequence_length": 32}  # fmt: skip
    changes = [f"{key}={value}" for key, value in sizes.items()]
    config = gpu_measure.read_config(preset, *changes, "train.precision=fp32", steps=1)
    with gpu_measure.synthetic_loader(config) as loader:
        inputs, (labels, _) = tensors(next(loader)[0][0])
    ours = build_model(decoder(config.model, Layers(), seed=0, segmented=False), config.run.seed)
    expected = F.cross_entropy(ours(inputs), labels.flatten()).item()
    labels = labels.contiguous()
    theirs = cpu_training.transformers_model(config).train()
    assert theirs(inputs[0], labels=labels, shift_labels=labels).loss.item() == pytest.approx(expected, rel=1e-5)
    assert theirs(inputs[0], labels=labels).loss.item() != pytest.approx(expected, rel=1e-5), "labels are not shifted"


def test_a_side_with_another_curve_is_refused() -> None:
    found = {side: {"losses": [6.2, 6.1]} for side in gpu_peers.SIDES}
    cpu_training.compare_losses(found, "bf16")
    found["deepspeed"] = {"losses": [6.2, 6.14]}
    with pytest.raises(MegalmError, match="deepspeed does not train the same model"):
        cpu_training.compare_losses(found, "bf16")


def test_the_ratio_is_the_median_of_rounds() -> None:
    rounds = [{"megalm": {"tokens_per_second": rate}, "trainer": {"tokens_per_second": 2.0}} for rate in (2, 3, 10)]
    assert gpu_peers.median_ratio(rounds, "trainer") == 1.5
