"""The benchmark compares like with like: both sides train the same model on the same data."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megalm.errors import MegalmError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_training.py"
TINY = {
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.num_attention_heads": 4,
    "model.num_layers": 2,
    "train.sequence_length": 32,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
}


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_training", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_train_the_same_model() -> None:
    command = [sys.executable, str(SCRIPT), "--precision", "fp32", "--threads", "1", "--rounds", "1"]
    command += ["--steps", "4", "--skip", "1", *(f"--set={key}={value}" for key, value in TINY.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "megalm / trainer = " in done.stdout


def test_another_curve_is_refused() -> None:
    def results(last: float) -> dict[str, dict[str, list[float]]]:
        return {"megalm": {"losses": [8.0, 7.0]}, "trainer": {"losses": [8.0, last]}}

    module = benchmark()
    module.compare_losses(results(7.0005), "fp32")
    with pytest.raises(MegalmError, match="does not train the same model"):
        module.compare_losses(results(7.001), "fp32")
