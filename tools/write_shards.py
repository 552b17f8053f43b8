"""Tokenise corpus files into shards: OUTPUT/train and OUTPUT/held_out."""

import argparse
import os
import sys
import time

from tqdm import tqdm

from megalm.command_line import count
from megalm.data.corpus import listed
from megalm.data.shards import Progress, write
from megalm.errors import main_guard


def _cores() -> int:
    """Those this process may use, which a job's share of a node or a container makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="folder, .model or tokenizer.json")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--held-out", type=float, default=0.01, metavar="SHARE", help="share of documents (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=count, default=_cores(), metavar="N", help="processes (default: %(default)s, one per core)"
    )
    parser.add_argument("--shard-megabytes", type=count, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="key of the text in JSONL (default: text)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    arguments = parser.parse_args()

    started = time.monotonic()
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def report(progress: Progress) -> None:
            bar.total = progress.total_bytes
            bar.set_postfix(documents=progress.documents, tokens=progress.tokens, refresh=False)
            bar.update(progress.bytes_read - bar.n)

        written = write(
            arguments.corpus,
            arguments.tokenizer,
            arguments.output,
            held_out_fraction=arguments.held_out,
            shard_bytes=arguments.shard_megabytes * 2**20,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            text_field=arguments.text_field,
            report=report,
        )
    parts = ", ".join(
        f"{name}: {written.documents[name]:,} documents, {written.tokens[name]:,} tokens" for name in written.documents
    )
    print(f"{arguments.output}: {parts}; skipped: {listed(written.skipped)}; in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main_guard(main)
