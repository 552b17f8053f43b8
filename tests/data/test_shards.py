"""Shards: what is written is what was tokenised, the same every time, and nothing else is ever loaded."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from megalm.data import shards
from megalm.data.corpus import Document, Tally, write_corpus
from megalm.data.index import OpenShards, ShardReader
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_every_time_and_for_any_number_of_workers(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 5000)
    for name, workers in (("first", 1), ("second", 1), ("third", 3)):
        shards.write(
            [corpus], tokenizer_path, tmp_path / name, held_out_fraction=0.1, shard_bytes=50_000, workers=workers
        )
    first = contents(tmp_path / "first")
    assert len([name for name in first if name.endswith(".tar")]) > 4
    assert contents(tmp_path / "second") == first
    assert contents(tmp_path / "third") == first
    shards.write([corpus], tokenizer_path, tmp_path / "other", held_out_fraction=0.2, shard_bytes=50_000)
    assert contents(tmp_path / "other") != first


def test_reader_gives_the_tokens_back(folder: Path, stream: list[list[int]]) -> None:
    reader = ShardReader(folder, verify_checksums=True)
    flat = np.concatenate([np.array(ids) for ids in stream])
    assert len(reader.index["shards"]) > 2
    assert (reader.documents, reader.tokens_total) == (len(stream), len(flat))
    np.testing.assert_array_equal(reader.tokens(0, len(flat)), flat)
    begins = np.cumsum([0, *map(len, stream)])
    generator = np.random.default_rng(0)
    for _ in range(300):
        start, stop = np.sort(generator.integers(0, len(flat) + 1, 2)).tolist()
        ids = np.empty(stop - start, np.int64)
        places = reader.read_into(ids, start)
        np.testing.assert_array_equal(ids, flat[start:stop])
        assert places == [begin - start for begin in begins[:-1].tolist() if start <= begin < stop]
    for number in (0, 1, len(stream) // 2, len(stream) - 1):
        assert reader.document(number).tolist() == stream[number]


def test_webdataset_and_tarfile_read_the_same_tokens(folder: Path, stream: list[list[int]]) -> None:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [np.frombuffer(sample["uint16"], "<u2").tolist() for sample in samples] == stream
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(len(stream))]
    with tarfile.open(urls[0]) as archive:
        members = archive.getmembers()
        assert {(member.mtime, member.uid, member.mode) for member in members} == {(0, 0, 0o644)}
        assert np.frombuffer(archive.extractfile(members[0]).read(), "<u2").tolist() == stream[0]


def test_large_vocabulary_takes_four_bytes_and_a_begin_token_is_written(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(70_000)}
    library = LibraryTokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    (tmp_path / "corpus.jsonl").write_text('{"text": "w69999 w5"}\n')
    shards.write([tmp_path / "corpus.jsonl"], tmp_path / "tokenizer.json", tmp_path / "out")
    reader = ShardReader(tmp_path / "out" / "train", load(tmp_path / "tokenizer.json"))
    assert reader.dtype == np.dtype("<u4")
    assert reader.tokens(0, reader.tokens_total).tolist() == [0, 70_001, 7, 1]
    # as earlier versions wrote them of a tokenizer that names a begin token and puts none
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(MegalmError, match=r"set add_bos_token to true in its tokenizer_config.json, or write"):
        ShardReader(tmp_path / "out" / "train", load(tmp_path / "tokenizer.json"))
    shards.write([tmp_path / "corpus.jsonl"], tmp_path / "tokenizer.json", tmp_path / "anew")
    reader = ShardReader(tmp_path / "anew" / "train", load(tmp_path / "tokenizer.json"))
    assert reader.tokens(0, reader.tokens_total).tolist() == [70_001, 7, 1]


def test_held_out_documents_are_chosen_by_their_text(
    texts: list[str], tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def held_out(order: list[str], name: str) -> set[str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        written = shards.write([path], tokenizer_path, tmp_path / name, held_out_fraction=0.1)
        assert written.documents["train"] + written.documents["held_out"] == len(order)
        reader = ShardReader(tmp_path / name / "held_out", tokenizer)
        return {tokenizer.decode(reader.document(i)) for i in range(reader.documents)}

    unique = sorted(set(texts))
    everything = held_out(unique, "everything")
    assert 0.05 < len(everything) / len(unique) < 0.15
    half = unique[::-2]
    assert held_out(half, "half") == everything & set(half)
    twice = held_out(unique + unique, "twice")
    assert twice == everything


def test_a_tiny_corpus_still_holds_one_document_out(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(5)))
    written = shards.write([path], tokenizer_path, tmp_path / "out", held_out_fraction=1e-9)
    assert written.documents == {"train": 4, "held_out": 1}
    ShardReader(tmp_path / "out" / "train")
    ShardReader(tmp_path / "out" / "held_out")
    path.write_text('{"text": "alone"}\n')
    with pytest.raises(MegalmError, match="single document"):
        shards.write([path], tokenizer_path, tmp_path / "out2", held_out_fraction=0.5)


def test_what_is_skipped_is_counted(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "good"}\n{"text": " "}\nnot json\n{"no": 1}\n\n{"text": "\\ud800"}\n[]\n{"text": 7}\n')
    written = shards.write([path], tokenizer_path, tmp_path / "out")
    assert written.documents == {"train": 1, "held_out": 0}
    assert written.skipped == {
        "empty": 1,
        "not JSON": 1,
        "without a text field 'text'": 3,
        "not Unicode (lone surrogates)": 1,
    }
    assert ShardReader(tmp_path / "out" / "train").index["skipped"] == dict(written.skipped)
    assert not (tmp_path / "out" / "held_out").exists()


def test_progress_reaches_the_end(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    seen: list[shards.Progress] = []
    written = shards.write([corpus], tokenizer_path, tmp_path / "out", report=seen.append)
    assert seen[-1].bytes_read == seen[-1].total_bytes == corpus.stat().st_size
    assert (seen[-1].documents, seen[-1].tokens) == (written.documents["train"], written.tokens["train"])


def test_existing_output_is_kept_unless_overwritten(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shards.write([corpus], tokenizer_path, tmp_path / "out", held_out_fraction=0.5)
    before = contents(tmp_path / "out")
    with pytest.raises(MegalmError, match="exists.*--overwrite"):
        shards.write([corpus], tokenizer_path, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    shards.write([corpus], tokenizer_path, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    ShardReader(tmp_path / "out" / "train")


def test_what_is_not_shards_is_never_overwritten(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("mine")
    with pytest.raises(MegalmError, match="something else than shards"):
        shards.write([corpus], tokenizer_path, tmp_path / "home", overwrite=True)
    assert contents(tmp_path / "home") == {"thesis": b"mine"}


@pytest.mark.parametrize(
    ("lines", "fraction", "message"),
    [("", 0.0, "no document"), ('{"text": ""}\n', 0.1, "no document"), ('{"text": "a"}\n', 1.5, "choose at least 0")],
)
def test_what_cannot_be_written(
    tokenizer_path: Path, tmp_path: Path, lines: str, fraction: float, message: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    with pytest.raises(MegalmError, match=message):
        shards.write([path], tokenizer_path, tmp_path / "out", held_out_fraction=fraction)
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_unwritable_folder_and_missing_corpus(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MegalmError, match="cannot write"):
        shards.write([corpus], tokenizer_path, tmp_path / "file" / "out")
    with pytest.raises(MegalmError, match="there is no corpus file"):
        shards.write([tmp_path / "none.jsonl"], tokenizer_path, tmp_path / "out")


def test_full_disk_leaves_nothing(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MegalmError, match="No space left"):
        shards.write([corpus], tokenizer_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from megalm.data import shards
if __name__ == "__main__":
    shards.BATCH_CHARACTERS = 2000
    def report(progress):
        print(progress.documents, flush=True)
        import time; time.sleep(0.05)
    shards.write([sys.argv[1]], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), shard_bytes=20_000, report=report)
"""


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 2)])
def test_killed_writer_leaves_nothing_that_loads(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, how: signal.Signals, workers: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(WRITER)
    output = tmp_path / "out"
    command = [sys.executable, str(script), str(corpus), str(tokenizer_path), str(output), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(shards.__file__).parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline()
        os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
        assert process.wait(timeout=30) != 0
        # The pipe closes when the last tokenising process is gone.
        assert process.stdout.read() is not None
    for folder in (output, output / "train", tmp_path / "out.partial" / "train"):
        with pytest.raises(MegalmError):
            ShardReader(folder)
    if how == signal.SIGINT:
        assert [entry.name for entry in tmp_path.iterdir()] == ["script.py"]
    shards.write([corpus], tokenizer_path, output)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "script.py"]
    ShardReader(output / "train", verify_checksums=True)


def test_two_writers_of_one_folder(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    def second(progress: shards.Progress) -> None:
        with pytest.raises(MegalmError, match="another process is writing"):
            shards.write([corpus], tokenizer_path, tmp_path / "out")

    shards.write([corpus], tokenizer_path, tmp_path / "out", report=second)
    ShardReader(tmp_path / "out" / "train")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-000001.tar", truncate, r"shard-000001\.tar is truncated"),
        ("shard-000001.tar", lambda path: path.write_bytes(path.read_bytes() + b"x"), "not the one that was written"),
        ("shard-000001.tar", Path.unlink, r"shard-000001\.tar is missing"),
        ("shard-000001.tar", flip, "checksum differs"),
        ("shard-000000.npy", Path.unlink, r"shard-000000\.npy is missing"),
        ("shard-000000.npy", flip, "checksum differs"),
        ("index.json", Path.unlink, "has no index.json"),
        ("index.json", truncate, "is damaged"),
        ("index.json", lambda path: path.write_text("[]"), "not written by megalm"),
        ("index.json", edit(lambda index: index.update(version=99)), "format version 99"),
        ("index.json", edit(lambda index: index["shards"].pop()), "was changed after it was written"),
    ],
)
def test_damaged_and_foreign_folders(
    folder: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    ShardReader(copy, verify_checksums=True)
    damage(copy / name)
    with pytest.raises(MegalmError, match=message):
        ShardReader(copy, verify_checksums=True)


def test_folder_of_the_parts_and_missing_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match="name .*train"):
        ShardReader(folder.parent)
    with pytest.raises(MegalmError, match="there is no shard folder"):
        ShardReader(tmp_path / "none")


def test_another_tokenizer_is_refused(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    ShardReader(folder, tokenizer)
    with pytest.raises(MegalmError, match="another tokenizer"):
        ShardReader(folder, train(lambda: texts, 1000))


def test_few_files_stay_open(corpus: Path, tokenizer_path: Path, tmp_path: Path, stream: list[list[int]]) -> None:
    shards.write([corpus], tokenizer_path, tmp_path / "out", shard_bytes=10_000)
    open_shards = OpenShards(2)
    readers = [ShardReader(tmp_path / "out" / "train", open_shards=open_shards) for _ in range(2)]
    assert len(readers[0].index["shards"]) > 20
    before = len(os.listdir("/proc/self/fd"))
    for reader in readers:
        assert reader.tokens(0, reader.tokens_total).tolist() == [i for ids in stream for i in ids]
    assert len(os.listdir("/proc/self/fd")) <= before + 4


READ_UNDER_A_LIMIT = """
import resource, sys
from megalm.data.config import DataConfig, SourceConfig
from megalm.data.index import OpenShards
from megalm.data.loader import Loader
from megalm.data.packing import Windows
from megalm.errors import MegalmError
from megalm.tokenizer.load import load

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
config = DataConfig(sources=[SourceConfig(path=path) for path in sys.argv[2:]], tokenizer=sys.argv[1])
sizes = dict(rank=0, size=1, global_batch_size=4, micro_batch_size=4, seed=0)
with Loader(Windows(config.sources, load(sys.argv[1]), 16), **sizes) as loader:
    for _ in range(1000):
        next(loader)
open_shards = OpenShards(1000)
try:
    for source in config.sources:
        for path in sorted(__import__("pathlib").Path(source.path).glob("*.tar")):
            open_shards(path, "<u2")
except MegalmError as error:
    print(error)
"""


def test_all_sources_together_keep_within_the_limit_on_files(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        shards.write([corpus], tokenizer_path, tmp_path / name, shard_bytes=10_000)
    folders = [tmp_path / name / "train" for name in ("first", "second")]
    assert all(len(list(folder.glob("*.tar"))) > 20 for folder in folders)
    done = subprocess.run(
        [sys.executable, "-c", READ_UNDER_A_LIMIT, str(tokenizer_path), *map(str, folders)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    # Negative control: this many shards at once are more than the limit, and the message says so.
    assert "too many files are open, raise the limit (ulimit -n)" in done.stdout


def test_fingerprint_is_of_the_documents_and_not_of_their_shards(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, folder: Path
) -> None:
    shards.write([corpus], tokenizer_path, tmp_path / "small", shard_bytes=10_000)
    assert ShardReader(tmp_path / "small" / "train").fingerprint == ShardReader(folder).fingerprint
    lines = corpus.read_text().splitlines(keepends=True)
    for number, changed in enumerate((lines[::-1], lines[:-1])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(changed))
        shards.write([path], tokenizer_path, tmp_path / str(number))
        assert ShardReader(tmp_path / str(number) / "train").fingerprint != ShardReader(folder).fingerprint


def test_fingerprint_knows_where_documents_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fingerprints = set()
    for name, contents in (("one", [b"abcd"]), ("two", [b"ab", b"cd"]), ("again", [b"abcd"])):
        writer = shards.ShardWriter(tmp_path / name, tokenizer, 1000)
        for content in contents:
            writer.add(content)
        writer.finish(Counter())
        fingerprints.add(ShardReader(tmp_path / name).fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_of_a_group_are_held_out_together(tokenizer_path: Path, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "corpus.jsonl"
    documents = [Document(f"document {i} of group {i % 40}", "", f"group {i % 40}") for i in range(400)]
    write_corpus(documents, path, Tally())
    shards.write([path], tokenizer_path, tmp_path / "out", held_out_fraction=0.2, workers=workers)
    tokenizer = load(tokenizer_path)
    groups = {}
    for part in ("train", "held_out"):
        reader = ShardReader(tmp_path / "out" / part)
        texts = [tokenizer.decode(reader.document(i)) for i in range(reader.documents)]
        groups[part] = {text.split(" of ")[1].removesuffix("<|endoftext|>") for text in texts}
    assert groups["train"] | groups["held_out"] == {document.group for document in documents}
    assert not groups["train"] & groups["held_out"]
    assert 1 <= len(groups["held_out"]) <= 20
