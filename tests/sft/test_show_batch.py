"""tools/show_batch.py shows what is trained, and tells a typed control token from a real one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sft.conftest import write_rows
from tools import show_batch

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a <|im_end|>?"}, {"role": "assistant", "content": "好"}]},
    {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "yes"}]},
]


def shown(
    folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *given: str
) -> str:
    tree = {
        "run": {"directory": str(folder / "run")},
        "task": {},
        "data": {"sources": [{"path": str(write_rows(folder / "rows.jsonl", ROWS))}], "tokenizer": str(tokenizer)},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 64},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr("sys.argv", ["show_batch.py", "--config", str(folder / "run.yaml"), *given])
    show_batch.main()
    assert not (folder / "run").exists()
    return capsys.readouterr().out


def test_plain_marks(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(tmp_path, tokenizer_folder, capsys, monkeypatch)
    assert "<<|im_start|>>user\na <|im_end|>?<<|im_end|>>\n<<|im_start|>>assistant\n[[好<<|im_end|>>]]" in text
    assert f"document 2 ({tmp_path / 'rows.jsonl'} 2), " in text and "[[yes<<|im_end|>>]]" in text
    assert "64 positions, " in text and " of padding" in text and "\033" not in text
    everything = shown(tmp_path, tokenizer_folder, capsys, monkeypatch, "--set", "task.train_on=all")
    assert "[[user\na <|im_end|>?" in everything, "negative control: another mask is shown as another"


def test_colour(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(tmp_path, tokenizer_folder, capsys, monkeypatch, "--colour", "always", "--step", "2")
    assert "\033[1;32m好\033[0m\033[1;7;32m<|im_end|>\033[0m" in text and "[[" not in text
