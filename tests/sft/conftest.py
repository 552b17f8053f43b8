"""A byte-level tokenizer with the control tokens of the named templates, and conversations."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load

CONTROLS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = list(topics.values())[:20]
    built.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    built.add_special_tokens(CONTROLS)
    path = tmp_path_factory.mktemp("tokenizer")
    built.save(str(path / "tokenizer.json"))
    names = {"eos_token": CONTROLS[0], "bos_token": "<s>", "add_bos_token": True, "pad_token": CONTROLS[0]}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load(tokenizer_folder)


@pytest.fixture(scope="session")
def conversations() -> list[list[dict[str, Any]]]:
    """One to three turns, some with a system message, of Python's documentation topics; one in Chinese."""
    texts = list(topics.values())
    made = []
    for n in range(24):
        turns: list[dict[str, Any]] = [{"role": "system", "content": texts[n][:20].strip()}] if n % 3 == 0 else []
        for turn in range(1 + n % 3):
            asked, answered = (
                texts[n][30 * turn :][: 6 + n].strip(),
                texts[n + 30][40 * turn :][: 6 + 2 * n].strip(),
            )
            turns += [{"role": "user", "content": asked or "?"}, {"role": "assistant", "content": answered or "!"}]
        made.append(turns)
    made.append([{"role": "user", "content": "你好吗？"}, {"role": "assistant", "content": "很好，谢谢😀"}])
    return made


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
