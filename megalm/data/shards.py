"""Write tokenised documents as standard .tar shards that webdataset itself reads.

A member is one document: its ids and the end-of-document id (after the begin-of-document id where the tokenizer has
one of its own), as raw little-endian uint16 or uint32; its name is the number of the document in the folder and that
type, for example `000000000042.uint16`. The folder's layout is in megalm/data/index.py.

Documents keep the order of the corpus: the loader permutes samples over the whole corpus anyway, and a shuffle here
would need the corpus in memory. Whether a document is held out depends on its text alone, so that it stays held out
when the corpus grows, is reordered or holds it twice; or on its `group` alone where the corpus gives it one, so that
documents that repeat each other (the parts of a book, two renderings of a page) are held out together or not at all.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalm.data import index
from megalm.data.corpus import Document, JsonlReader, Tally, listed
from megalm.disk import sync
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load

TRAIN, HELD_OUT = "train", "held_out"
BATCH_CHARACTERS = 500_000
"""Text handed to a worker at a time."""
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Written:
    """What `write` left in the folder."""

    documents: dict[str, int]
    """By part (train, held_out)."""
    tokens: dict[str, int]
    """By part, ends of documents included."""
    skipped: Counter[str]
    """Documents left out, by reason."""


@dataclass(frozen=True)
class Progress:
    """Where the writing stands."""

    bytes_read: int
    total_bytes: int
    documents: int
    tokens: int


def write(
    corpus: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    held_out_fraction: float = 0.0,
    shard_bytes: int = 256 * 2**20,
    workers: int = 1,
    overwrite: bool = False,
    text_field: str = "text",
    report: Callable[[Progress], None] | None = None,
) -> Written:
    """Tokenise corpora (.jsonl, .jsonl.gz, .jsonl.zst) into OUTPUT/train and OUTPUT/held_out.

    The result is the same byte for byte whatever the number of workers. It is written to OUTPUT.partial and renamed
    when it is whole and on the disk, so a killed writer leaves nothing that loads.

    Args:
        held_out_fraction: share of documents, by a hash of their `group` (of their text where they have none), that go
            to OUTPUT/held_out; at least one does unless it is 0, when there is no such folder.
        shard_bytes: a shard is closed when it has reached this size.
        workers: processes that tokenise; 1 tokenises in this one.
        overwrite: replace an existing OUTPUT, if it holds shards; refused otherwise.
        report: called after every batch of documents.

    Raises:
        MegalmError: nothing to write, a folder that exists or cannot be written, a full disk.
    """
    if workers < 1:
        raise MegalmError(f"the number of workers is {workers}: choose at least 1")
    tokenizer = load(tokenizer_path)
    tally, reader = Tally(), JsonlReader(corpus, Tally(), text_field)

    def tokenised() -> Iterator[tuple[list[int], list[bytes]]]:
        nonlocal tally, reader
        tally = Tally()
        reader = JsonlReader(corpus, tally, text_field)
        yield from _tokenise(reader, tokenizer_path, tokenizer, workers)

    def progress(documents: int, tokens: int) -> None:
        if report is not None:
            report(Progress(reader.bytes_read, reader.total_bytes, documents, tokens))

    return write_tokenised(
        tokenised,
        tokenizer,
        output,
        held_out_fraction=held_out_fraction,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        skipped=lambda: tally.skipped,
        report=progress,
    )


def write_tokenised(
    tokenised: Callable[[], Iterable[tuple[list[int], list[bytes]]]],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    held_out_fraction: float = 0.0,
    shard_bytes: int = 256 * 2**20,
    overwrite: bool = False,
    skipped: Callable[[], Counter[str]] = Counter,
    report: Callable[[int, int], None] | None = None,
) -> Written:
    """`write`, of documents that are tokenised already.

    Args:
        tokenised: called once, or twice for a corpus so small that chance held out none; returns batches of (held-out
            hashes, ids as bytes), as encode_documents() does.
        skipped: called at the end: documents that were left out, by reason.
        report: called after every batch with the documents and tokens so far.
    """
    output = Path(output)
    if not 0.0 <= held_out_fraction < 1.0:
        raise MegalmError(f"the held-out fraction is {held_out_fraction}: choose at least 0 and less than 1")
    threshold = int(held_out_fraction * 2**64)
    try:
        with _partial_folder(output, overwrite) as partial:
            while True:
                parts, smallest_hash = _write_parts(tokenised(), partial, tokenizer, threshold, shard_bytes, report)
                if parts[TRAIN].documents + parts[HELD_OUT].documents == 0:
                    raise MegalmError(
                        f"the corpus holds no document to write (skipped: {listed(skipped())}): name one that does"
                    )
                if held_out_fraction and parts[TRAIN].documents + parts[HELD_OUT].documents == 1:
                    raise MegalmError("the corpus is a single document: give more, or set the held-out fraction to 0")
                if held_out_fraction == 0.0 or parts[HELD_OUT].documents:
                    break
                threshold = smallest_hash + 1  # a corpus so small that chance held out none
            if parts[TRAIN].documents == 0:
                raise MegalmError(f"a held-out fraction of {held_out_fraction} leaves nothing to train on: lower it")
            for part in parts.values():
                if part.documents:
                    part.finish(skipped())
                else:
                    part.folder.rmdir()
    except BrokenProcessPool as error:
        raise MegalmError("a tokenising process was killed (out of memory?): lower the number of workers") from error
    except OSError as error:
        raise MegalmError(f"cannot write {output}: {error.strerror or error}") from error
    return Written(
        {name: part.documents for name, part in parts.items()},
        {name: part.tokens for name, part in parts.items()},
        skipped(),
    )


def held_out_hash(document: Document) -> int:
    """64-bit number that decides whether a document is held out: the same for all documents of a group."""
    decisive = (document.group or document.text).encode()
    return int.from_bytes(hashlib.blake2b(decisive, digest_size=8, person=b"megalm-heldout").digest(), "big")


def _write_parts(
    tokenised: Iterable[tuple[list[int], list[bytes]]],
    partial: Path,
    tokenizer: Tokenizer,
    threshold: int,
    shard_bytes: int,
    report: Callable[[int, int], None] | None,
) -> tuple[dict[str, "ShardWriter"], int]:
    """Distribute documents over the parts; also the smallest hash seen."""
    smallest = 2**64 - 1
    with ExitStack() as stack:
        parts = {}
        for name in (TRAIN, HELD_OUT):
            shutil.rmtree(partial / name, ignore_errors=True)
            parts[name] = ShardWriter(partial / name, tokenizer, shard_bytes)
            stack.callback(parts[name].abandon)
        for hashes, documents in tokenised:
            for number, ids in zip(hashes, documents, strict=True):
                smallest = min(smallest, number)
                parts[HELD_OUT if number < threshold else TRAIN].add(ids)
            if report is not None:
                report(sum(part.documents for part in parts.values()), sum(part.tokens for part in parts.values()))
        for part in parts.values():
            part.close_shard()
    return parts, smallest


class ShardWriter:
    """One shard folder in the making: `add` documents, then `finish`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int) -> None:
        """Make the folder, which must not exist. A shard is closed when it has reached shard_bytes."""
        self.folder = folder
        self.documents = 0
        self.tokens = 0
        self._tokenizer = tokenizer
        self._dtype = _dtype(tokenizer)
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._stream: BinaryIO | None = None
        self._table: list[tuple[int, int]] = []
        self._shard_tokens = 0
        self._content = hashlib.sha256(tokenizer.fingerprint.encode())
        folder.mkdir(parents=True)

    def add(self, content: bytes) -> None:
        """Append a document: its ids in the shards' type, little-endian, the end included."""
        if self._stream is None:
            self._stream = (self.folder / f"shard-{len(self._shards):06d}.tar").open("wb")
        header = tarfile.TarInfo(f"{self.documents:012d}.{self._dtype.name}")
        header.size, header.mode, header.mtime = len(content), 0o644, 0
        self._stream.write(header.tobuf(tarfile.USTAR_FORMAT))
        self._table.append((self._shard_tokens, self._stream.tell()))
        self._stream.write(content + bytes(-len(content) % BLOCK))
        self._content.update(len(content).to_bytes(8, "little") + content)
        tokens = len(content) // self._dtype.itemsize
        self._shard_tokens += tokens
        self.documents += 1
        self.tokens += tokens
        if self._stream.tell() >= self._shard_bytes:
            self.close_shard()

    def close_shard(self) -> None:
        """End the .tar that is being written, and write its table."""
        if self._stream is None:
            return
        path = Path(self._stream.name)
        stream, self._stream = self._stream, None
        with stream:
            end = stream.tell()
            stream.write(bytes(2 * BLOCK))  # the end mark of a .tar
            _sync(stream)
        table = np.array([*self._table, (self._shard_tokens, end)], np.int64).T
        table_path = path.with_suffix(".npy")
        with table_path.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(table))
            _sync(stream)
        self._shards.append(
            {
                "name": path.name,
                "documents": len(self._table),
                "tokens": self._shard_tokens,
                "bytes": path.stat().st_size,
                "sha256": index.checksum(path),
                "index_bytes": table_path.stat().st_size,
                "index_sha256": index.checksum(table_path),
            }
        )
        self._table, self._shard_tokens = [], 0

    def abandon(self) -> None:
        """Close what is open; the folder stays without an index and does not load."""
        if self._stream is not None:
            self._stream.close()

    def finish(self, skipped: Counter[str]) -> None:
        """Write index.json, which makes the folder a shard folder."""
        self.close_shard()
        tokenizer = self._tokenizer
        described = {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": _begin(tokenizer),
            "eos_id": tokenizer.eos_id,
        }
        content: dict[str, Any] = {
            "format": index.FORMAT,
            "version": index.VERSION,
            "fingerprint": self._content.hexdigest(),
            "tokenizer": described,
            "dtype": self._dtype.str,
            "documents": self.documents,
            "tokens": self.tokens,
            "skipped": dict(sorted(skipped.items())),
            "shards": self._shards,
        }
        content["checksum"] = index.index_checksum(content)
        with (self.folder / index.INDEX_FILE).open("w") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync(self.folder)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _partial_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """OUTPUT.partial, which takes OUTPUT's place at the end, or vanishes when anything fails."""
    if output.exists():
        if not overwrite:
            raise MegalmError(f"{output} exists: name another folder, or pass --overwrite to replace it")
        if not (output / TRAIN / index.INDEX_FILE).exists():
            raise MegalmError(f"{output} holds something else than shards, which is not overwritten: move it away")
    partial = output.with_name(output.name + ".partial")
    lock_path = output.with_name(output.name + ".lock")
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MegalmError(f"another process is writing {output}: wait for it, or name another folder") from None
        try:
            shutil.rmtree(partial, ignore_errors=True)  # what a killed writer left
            partial.mkdir()
            yield partial
            old = output.with_name(output.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            if output.exists():
                output.rename(old)
            partial.rename(output)
            sync(output.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _begin(tokenizer: Tokenizer) -> int | None:
    """Id put before each document: none where one token is both begin and end (GPT-2)."""
    return next(iter(tokenizer.begins), None)


def _tokenise(
    documents: Iterable[Document], tokenizer_path: str | Path, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[int], list[bytes]]]:
    """Batches of (held-out hashes, ids as bytes), in the order of the documents."""
    if workers == 1:
        for batch in _batches(documents):
            yield encode_documents(tokenizer, batch)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _Worker.start, (str(tokenizer_path),)) as pool:
        pending: deque[Future[tuple[list[int], list[bytes]]]] = deque()
        try:
            for batch in _batches(documents):
                pending.append(pool.submit(_Worker.encode, batch))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> tuple[list[int], list[bytes]]:
    """Held-out hash and ids, as the bytes of a member, of each document."""
    dtype = _dtype(tokenizer)
    begin = _begin(tokenizer)
    before = [] if begin is None else [begin]
    rows = tokenizer.encode_batch([document.text for document in documents])
    content = [np.array([*before, *row, tokenizer.eos_id], dtype).tobytes() for row in rows]
    return [held_out_hash(document) for document in documents], content


class _Worker:
    """State of a tokenising process."""

    tokenizer: Tokenizer

    @staticmethod
    def start(tokenizer_path: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        _Worker.tokenizer = load(tokenizer_path)

    @staticmethod
    def encode(documents: list[Document]) -> tuple[list[int], list[bytes]]:
        return encode_documents(_Worker.tokenizer, documents)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
