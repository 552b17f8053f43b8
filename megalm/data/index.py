"""What lies beside the .tar files of a shard folder, and random access to their tokens.

FOLDER/index.json            counts, sizes, checksums, tokenizer, fingerprint
FOLDER/shard-000000.tar      one member per document: its ids, little-endian uint16 or uint32
FOLDER/shard-000000.npy      int64 [2, documents + 1]: row 0 the token number at which each document of the shard
                             begins (and the shard ends), row 1 the byte of the .tar at which its ids begin
"""

import bisect
import errno
import hashlib
import itertools
import json
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer

INDEX_FILE = "index.json"
FORMAT = "megalm-shards"
VERSION = 1
TOKEN_STARTS, BYTE_OFFSETS = 0, 1
FEW_DOCUMENTS = 64
"""Up to this many documents are copied one by one; gathering token by token is faster above."""


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


Mapped = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a shard: token starts [documents + 1], byte offsets [documents + 1], and the whole .tar seen as ids."""


class OpenShards:
    """The shards that are mapped now, of any number of readers; what was read longest ago is closed first."""

    DESCRIPTORS = 2
    """A mapping holds a file descriptor of its own until it goes: one for the .tar, one for the .npy."""
    MOST = 4096
    """Where the system sets no limit on descriptors, it still limits mappings (65,530 by default)."""

    def __init__(self, limit: int | None = None) -> None:
        """limit: shards at once; by default those that take a quarter of the file descriptors this process may have,
        128 where it may have 1,024."""
        if limit is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            limit = self.MOST if soft == resource.RLIM_INFINITY else min(soft // (4 * self.DESCRIPTORS), self.MOST)
        self.limit = max(1, limit)
        self._mapped: OrderedDict[tuple[Path, np.dtype], Mapped] = OrderedDict()

    def __call__(self, path: Path, dtype: np.dtype) -> Mapped:
        """The shard whose .tar is at `path`. Raises MegalmError when it cannot be read."""
        key = (path, dtype)
        if key in self._mapped:
            self._mapped.move_to_end(key)
            return self._mapped[key]
        while len(self._mapped) >= self.limit:
            self._mapped.popitem(last=False)
        try:
            table = np.asarray(np.load(path.with_suffix(".npy"), mmap_mode="r"))
            mapped = table[TOKEN_STARTS], table[BYTE_OFFSETS], np.asarray(np.memmap(path, dtype, mode="r"))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise MegalmError(f"cannot open {path}: too many files are open, raise the limit (ulimit -n)") from None
            raise MegalmError(f"cannot read the shard {path} ({error}): was it changed while in use?") from error
        self._mapped[key] = mapped
        return mapped


class ShardReader:
    """The documents of a shard folder as one stream of token ids, in the order they were written.

    Opening costs one small file however large the corpus is; shards are mapped into memory when they are first read.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        verify_checksums: bool = False,
        open_shards: OpenShards | None = None,
    ) -> None:
        """Check the folder and open it.

        Args:
            folder: what tools/write_shards.py wrote (its `train` or `held_out`).
            tokenizer: refused unless it is the one the shards were written with; None skips the check.
            verify_checksums: read every byte once and compare; otherwise sizes alone are compared.
            open_shards: shared by readers that are read in turn, so that together they keep within its limit.

        Raises:
            MegalmError: the folder is missing, not ours, truncated, damaged, empty, or of another tokenizer.
        """
        self.folder = Path(folder)
        index = self.index = _read_index(self.folder)
        theirs = index["tokenizer"]
        if tokenizer is not None and theirs["fingerprint"] != tokenizer.fingerprint:
            raise MegalmError(
                f"{self.folder} was written with another tokenizer (fingerprint {theirs['fingerprint'][:12]}, "
                f"{theirs['vocab_size']} ids) than the one given ({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} "
                f"ids): {tokenizer.way_to(theirs['fingerprint'], 'set data.tokenizer to the former')}, or write the "
                "shards anew"
            )
        for shard in index["shards"]:
            _check_shard(self.folder, shard, verify_checksums)
        self.tokens_total: int = index["tokens"]
        """Tokens in the stream, ends of documents included."""
        self.documents: int = index["documents"]
        """Documents in the stream."""
        if self.tokens_total < 2:
            raise MegalmError(f"{self.folder} holds no text to train on ({self.tokens_total} tokens): write more")
        self.fingerprint: str = index["fingerprint"]
        """Hash of all documents, as tokens, and their order; the same however large the shards are."""
        self.dtype = np.dtype(index["dtype"])
        self._token_starts = [0, *itertools.accumulate(shard["tokens"] for shard in index["shards"])]
        self._document_starts = [0, *itertools.accumulate(shard["documents"] for shard in index["shards"])]
        self._open_shards = open_shards or OpenShards()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids start..stop of the stream, int64 [stop - start]."""
        ids = np.empty(stop - start, np.int64)
        self.read_into(ids, start)
        return ids

    def read_into(self, ids: np.ndarray, start: int) -> list[int]:
        """Fill an int64 array [length] with the ids from `start` on.

        Returns the places in it, ascending, at which a document begins.
        """
        stop = start + len(ids)
        assert 0 <= start <= stop <= self.tokens_total
        places: list[int] = []
        shard = bisect.bisect_right(self._token_starts, start) - 1
        done = start
        while done < stop:
            base, end = self._token_starts[shard], min(stop, self._token_starts[shard + 1])
            begins = _copy_documents(ids[done - start : end - start], self._shard(shard), done - base)
            places += [place + base - start for place in begins]
            done, shard = end, shard + 1
        return places

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, its end included, int64."""
        assert 0 <= number < self.documents
        shard = bisect.bisect_right(self._document_starts, number) - 1
        start, stop = (
            self._shard(shard)[TOKEN_STARTS][number - self._document_starts[shard] :][:2] + self._token_starts[shard]
        )
        return self.tokens(int(start), int(stop))

    def _shard(self, number: int) -> Mapped:
        return self._open_shards(self.folder / self.index["shards"][number]["name"], self.dtype)


def _copy_documents(ids: np.ndarray, shard: Mapped, start: int) -> list[int]:
    """Fill ids [length] from documents that lie apart in the .tar, from token `start` of the shard on.

    Returns the tokens of the shard, within the range, at which a document begins.
    """
    starts, offsets, stream = shard
    stop = start + len(ids)
    first = int(starts.searchsorted(start, "right")) - 1
    last = int(starts.searchsorted(stop, "left"))
    bounds = starts[first:last].tolist()
    if last - first > FEW_DOCUMENTS:
        shift = offsets[first:last] // stream.itemsize - starts[first:last]
        lengths = np.diff([start, *bounds[1:], stop])
        ids[:] = stream[np.arange(start, stop) + np.repeat(shift, lengths)]
    else:
        ends = [*bounds[1:], stop]
        for begin, end, offset in zip(bounds, ends, offsets[first:last].tolist(), strict=True):
            source = offset // stream.itemsize - begin
            begin = max(begin, start)
            ids[begin - start : end - start] = stream[source + begin : source + end]
    return bounds if bounds[0] == start else bounds[1:]


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise MegalmError(f"there is no shard folder {folder}: correct the path, or run tools/write_shards.py")
    if not path.exists():
        inner = [name for name in ("train", "held_out") if (folder / name / INDEX_FILE).exists()]
        if inner:
            raise MegalmError(f"{folder} is not a shard folder itself: name {folder / inner[0]}")
        raise MegalmError(
            f"{folder} has no {INDEX_FILE}: its writing was not finished, or megalm did not write it; "
            "run tools/write_shards.py"
        )
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MegalmError(f"{path} is damaged ({error}): copy the folder again, or write the shards anew") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise MegalmError(f"{path} was not written by megalm: run tools/write_shards.py on the corpus")
    if index.get("version") != VERSION:
        raise MegalmError(
            f"{path} has format version {index.get('version')}, this megalm reads {VERSION}: write the shards anew"
        )
    if index.get("checksum") != index_checksum(index):
        raise MegalmError(f"{path} was changed after it was written: copy the folder again, or write the shards anew")
    return index


def index_checksum(index: dict[str, Any]) -> str:
    """SHA-256 of the content of index.json without its own checksum."""
    content = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_shard(folder: Path, shard: dict[str, Any], verify_checksums: bool) -> None:
    for name, size, expected in (
        (shard["name"], shard["bytes"], shard["sha256"]),
        (Path(shard["name"]).with_suffix(".npy").name, shard["index_bytes"], shard["index_sha256"]),
    ):
        path = folder / name
        if not path.exists():
            raise MegalmError(f"the shard file {path} is missing: copy the folder again, or write the shards anew")
        found = path.stat().st_size
        if found != size:
            what = "truncated" if found < size else "not the one that was written"
            raise MegalmError(
                f"the shard file {path} is {what} ({found:,} bytes, {size:,} expected): copy it again, or write the "
                "shards anew"
            )
        if verify_checksums and checksum(path) != expected:
            raise MegalmError(
                f"the content of the shard file {path} is not what was written (its checksum differs): copy it again, "
                "or write the shards anew"
            )
