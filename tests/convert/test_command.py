"""The command, as it is typed."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalm.errors import MegalmError
from megalm.eval.load import load_model
from tests.convert import models
from tools import convert_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]


def test_both_directions(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        convert_checkpoint.main()
        captured = capsys.readouterr()
        assert captured.err == "", "a bar is for a terminal"
        return captured.out

    run = tmp_path / "run"
    models.checkpoint(run / "checkpoints", *models.build(), tokenizer_path, tensor=2, pipeline=2)
    said = command("to-hf", run, tmp_path / "hf")
    assert said.startswith(f"{tmp_path / 'hf'}: llama, ") and "logits differ from transformers' by at most" in said
    assert "; not verified; in " in command("from-hf", tmp_path / "hf", tmp_path / "back", "--no-verify")
    assert load_model(tmp_path / "back")[1].vocab_size == 600
    with pytest.raises(MegalmError, match="exists: name another output folder"):
        command("to-hf", run, tmp_path / "hf", "--dtype", "bf16", "--max-shard-size", "1MB")


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "convert_checkpoint.py", "from-hf", tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is not a Hugging Face folder: it has no config.json\n"
