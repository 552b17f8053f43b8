"""The commands from documents to shards, as they are typed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.data.index import ShardReader
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train

REPOSITORY = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def succeed(tool: str, *arguments: object) -> str:
    done = run(tool, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "texts" / "b.txt").write_text("Only here: <|im_end|>\n")
    return folder


def test_from_documents_to_shards(work: Path) -> None:
    corpus, tokenizer, output = work / "corpus.jsonl.zst", work / "tokenizer", work / "shards"
    said = succeed("prepare_corpus", work / "texts", "--python", "--python-parts", "topics", "--output", corpus)
    assert "documents" in said
    assert "repeated" in said
    training = ("train_tokenizer", "--corpus", corpus, "--output", tokenizer, "--vocab-size", 800)
    assert "800 ids" in succeed(*training)
    assert "holds a tokenizer, which shards written with it need" in run(*training).stderr
    assert "800 ids" in succeed(*training, "--overwrite")
    said = succeed(
        "write_shards", "--corpus", corpus, "--tokenizer", tokenizer, "--output", output, "--held-out", 0.1,
        "--workers", 2,
    )  # fmt: skip
    trained, held_out = (
        ShardReader(output / "train", load(tokenizer)),
        ShardReader(output / "held_out", load(tokenizer)),
    )
    assert f"train: {trained.documents:,} documents, {trained.tokens_total:,} tokens" in said
    assert f"held_out: {held_out.documents:,} documents" in said
    said = succeed("show_shards", output / "train", output / "held_out", "--tokenizer", tokenizer, "--verify")
    assert f"{trained.tokens_total:,}" in said
    assert trained.fingerprint in said
    assert load(tokenizer).fingerprint in said
    texts = {load(tokenizer).decode(part.document(i)) for part in (trained, held_out) for i in range(part.documents)}
    assert "Only here: <|im_end|>\n" in texts


def test_a_corpus_without_text_is_told_what_was_skipped(work: Path) -> None:
    corpus, tokenizer = work / "unusable.jsonl", work / "of_another_text"
    corpus.write_text('{"content": "a"}\n{"text": " "}\nx\n')
    skipped = "(skipped: 1 empty, 1 not JSON, 1 without a text field 'text'): name "
    done = run("train_tokenizer", "--corpus", corpus, "--output", tokenizer)
    assert done.stderr.splitlines()[-1].startswith(f"error: {corpus} holds no text to train on {skipped}")
    train(lambda: ["some text " * 100], 270).save(tokenizer)
    done = run("write_shards", "--corpus", corpus, "--tokenizer", tokenizer, "--output", work / "none", "--workers", 1)
    assert done.stderr.startswith(f"error: the corpus holds no document to write {skipped}")
    corpus.write_text("")
    done = run("write_shards", "--corpus", corpus, "--tokenizer", tokenizer, "--output", work / "none", "--workers", 1)
    assert "(skipped: nothing)" in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes")
def test_one_worker_per_core_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # the command inherits it
    try:
        said = succeed("write_shards", "--help")
    finally:
        os.sched_setaffinity(0, before)
    assert "(default: 1, one per core)" in " ".join(said.split())


@pytest.mark.parametrize(
    ("tool", "option", "number", "least"),
    [
        ("prepare_corpus", "--max-characters", "0", 1),
        ("prepare_corpus", "--limit-characters", "-5", 1),
        ("write_shards", "--shard-megabytes", "0", 1),
        ("write_shards", "--workers", "two", 1),
        ("show_shards", "--documents", "-1", 1),
        ("generate", "--max-new-tokens", "-1", 0),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    tool: str, option: str, number: str, least: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, option, number])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"tools.{tool}").main()
    assert f"argument {option}: {number} is not a whole number from {least} on\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("prepare_corpus", ["--output", "x.jsonl"], "nothing to gather"),
        ("prepare_corpus", ["missing", "--output", "x.jsonl"], "no file or folder missing"),
        ("train_tokenizer", ["--corpus", "missing.jsonl", "--output", "x"], "no corpus file missing.jsonl"),
        ("write_shards", ["--corpus", "a.jsonl", "--tokenizer", "missing", "--output", "x"], "no tokenizer at missing"),
        ("show_shards", ["missing"], "no shard folder missing"),
    ],
)
def test_mistakes_are_one_sentence(tool: str, arguments: list[str], message: str) -> None:
    done = run(tool, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
