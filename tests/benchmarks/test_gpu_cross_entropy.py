"""That a loss which is wrong is not timed, and what the shares are of."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.nn.cross_entropy import cross_entropy
from tests.benchmarks.scripts import script
from tests.distributed.ranks import run_ranks

gpu_cross_entropy = script("gpu_cross_entropy")
CPU = torch.device("cpu")


def test_a_wrong_loss_is_not_timed() -> None:
    logits, labels = gpu_cross_entropy.sample(48, 1000, CPU)

    def measured(loss: object) -> dict[str, float]:
        return gpu_cross_entropy.measure(loss, logits, labels, CPU, repeats=2)

    assert list(measured(cross_entropy)) == ["forward", "backward"]
    assert "its loss is" in measured(lambda x, y: cross_entropy(x, y) * 1.001)["wrong"]

    def other_gradient(x: Tensor, y: Tensor) -> Tensor:
        out = cross_entropy(x, y)
        return out + 0.1 * (x.float().sum(1) - x.detach().float().sum(1))

    assert "its gradient is" in measured(other_gradient)["wrong"]

    def breaks(x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nof this GPU")

    assert measured(breaks) == {"refused": "RuntimeError: no kernel image"}


def test_shares_are_of_what_a_pass_cannot_do_without(capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 bytes of logits and a copy that moves 4,000 bytes a second, read and written."""
    gpu_cross_entropy.show("megalm", 5, 100, {"forward": 0.5, "backward": 1.0}, traffic=1000, copied=4000)
    assert capsys.readouterr().out.split() == ["megalm", "5", "100", "500.000", "50.0%", "1000.000", "50.0%"]


def whole(output: str) -> int:
    import sys

    sys.argv = ["gpu_cross_entropy.py", "--device", "cpu", "--preset", "tiny", "--quick", "--output", output]
    return gpu_cross_entropy.main()


def test_the_whole_path_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert run_ranks(1, whole, str(output)) == [0]
    facts, *rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert facts["benchmark"] == "cross_entropy"
    assert {"megalm", "torch"} <= {row["loss"] for row in rows}
    assert all(row["forward"] > 0 and row["copied"] > 0 for row in rows if "forward" in row)
