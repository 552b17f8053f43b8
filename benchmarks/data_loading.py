"""Tokens per second of megalm's loader against webdataset's own reader and a bare numpy.memmap.

All read the same tokens, which this script writes first: documents of web-like lengths (log-normal), or records of one
length (--document-tokens). They run in turn, several times, on one thread and a warm page cache; the best time of each
counts. Also measured: how long the first batch takes at sample 0, and when a run resumes at sample 10^9.

webdataset hands out the raw ids of one document after the other, in the order of the files ("as batches": cut into
inputs and labels, as the loader does). The loader hands out whole batches (tokens, labels, mask, segments, positions)
of samples in permuted order. memmap copies windows as int64, in order. What the loader costs per sample hardly depends
on its documents, what webdataset costs per document hardly on their length: the ratio falls as documents grow.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import webdataset

from megalm.data.config import SourceConfig
from megalm.data.index import ShardReader
from megalm.data.loader import Loader
from megalm.data.packing import Windows, window_count
from megalm.data.shards import ShardWriter
from megalm.errors import main_guard
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.train import train

REQUIRED_RATIO = 5.0
LATE = 10**9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="default: %(default)s")
    parser.add_argument("--document-tokens", type=int, help="one length for all (default: log-normal, mean about 800)")
    parser.add_argument("--sequence-length", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="sequences per micro-batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    tokenizer = train(topics.values, 2000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "shards")
        write_random(folder, tokenizer, arguments.tokens, arguments.document_tokens)
        reader = ShardReader(folder, tokenizer)
        flat = Path(temporary, "tokens.bin")
        reader.tokens(0, reader.tokens_total).astype("<u2").tofile(flat)
        print(f"{reader.tokens_total:,} tokens in {reader.documents:,} documents; batches of {arguments.batch} x "
              f"{arguments.sequence_length}")  # fmt: skip

        def loader(prefetch: int, attend: bool) -> Loader:
            sources, batch = [SourceConfig(path=str(folder))], arguments.batch
            samples = Windows(sources, tokenizer, arguments.sequence_length, attend_across_documents=attend)
            return Loader(samples, rank=0, size=1, global_batch_size=batch, micro_batch_size=batch,
                          seed=1, prefetch=prefetch)  # fmt: skip

        def loader_reader(prefetch: int, attend: bool) -> Callable[[], int]:
            return lambda: read_loader(loader(prefetch, attend), reader.tokens_total)

        readers = {
            "webdataset": lambda: read_webdataset(folder),
            "webdataset, as batches": lambda: read_webdataset_batches(
                folder, arguments.sequence_length, arguments.batch
            ),
            "loader": loader_reader(2, True),
            "loader, no prefetch": loader_reader(0, True),
            "loader, documents apart": loader_reader(2, False),
            "memmap": lambda: read_memmap(flat, arguments.sequence_length, arguments.batch),
        }
        rates = dict.fromkeys(readers, 0.0)
        for _ in range(arguments.rounds):
            for name, read in readers.items():
                rates[name] = max(rates[name], rate(read))
        print(f"\n{'':26}{'M tokens/s':>12}{'x webdataset':>14}{'x memmap':>10}")
        for name, value in rates.items():
            row = f"{value / 1e6:>12.1f}{value / rates['webdataset']:>14.2f}{value / rates['memmap']:>10.2f}"
            print(f"{name:26}{row}")

        resume(folder, tokenizer, arguments.sequence_length, arguments.batch)
        ratio = rates["loader"] / rates["webdataset"]
        print(f"\nloader / webdataset = {ratio:.1f} (required: {REQUIRED_RATIO:.0f})")
        return 0 if ratio >= REQUIRED_RATIO else 1


def write_random(folder: Path, tokenizer: Tokenizer, tokens: int, length: int | None) -> None:
    """A shard folder of random ids."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, tokenizer, 64 * 2**20)
    while writer.tokens < tokens:
        size = length or int(np.clip(generator.lognormal(6.2, 1.0), 8, 100_000))
        ids = generator.integers(5, tokenizer.vocab_size, size, dtype=np.uint16)
        ids[-1] = tokenizer.eos_id
        writer.add(ids.tobytes())
    writer.finish(Counter())


def rate(read: Callable[[], int]) -> float:
    """Tokens per second of one pass."""
    started = time.perf_counter()
    return read() / (time.perf_counter() - started)


def read_webdataset(folder: Path) -> int:
    """One pass of webdataset, ids as arrays."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    return sum(np.frombuffer(sample["uint16"], "<u2").size for sample in dataset)


def read_webdataset_batches(folder: Path, sequence_length: int, batch: int) -> int:
    """One pass of webdataset, cut into inputs and labels [batch, sequence_length] as int64."""
    size = sequence_length * batch
    parts: list[np.ndarray] = []
    waiting = done = 0
    for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        parts.append(np.frombuffer(sample["uint16"], "<u2"))
        waiting += len(parts[-1])
        while waiting > size:
            ids = np.concatenate(parts)
            window = ids[: size + 1].astype(np.int64)
            done += window[:-1].reshape(batch, -1).size
            parts = [ids[size:]]
            waiting -= size
    return done


def read_loader(loader: Loader, tokens: int) -> int:
    """One epoch of the loader."""
    done = 0
    with loader:
        while done < tokens:
            batches, _ = next(loader)
            done += sum(batch.tokens.size for batch in batches)
    return done


def read_memmap(path: Path, sequence_length: int, batch: int) -> int:
    """Consecutive batches [batch, sequence_length] as int64."""
    ids = np.memmap(path, "<u2", mode="r")
    size = sequence_length * batch
    return sum(ids[start : start + size].astype(np.int64).size for start in range(0, len(ids), size))


def resume(folder: Path, tokenizer: Tokenizer, sequence_length: int, batch: int) -> None:
    """Print the latency of the first batch at sample 0 and at sample LATE, from opening the shards on."""
    sources = [SourceConfig(path=str(folder))]
    count = window_count(ShardReader(folder).tokens_total, sequence_length)
    print()
    for start in (0, LATE):
        times = []
        for _ in range(20):
            started = time.perf_counter()
            samples = Windows(sources, tokenizer, sequence_length)
            loader = Loader(samples, rank=0, size=1, global_batch_size=batch, micro_batch_size=batch,
                            seed=1, start=start, prefetch=0)  # fmt: skip
            next(loader)
            times.append(time.perf_counter() - started)
        best = min(times) * 1e3
        print(f"open and read the first batch at sample {start:>13,} (epoch {start // count:,}): {best:.2f} ms")


if __name__ == "__main__":
    main_guard(main)
