"""Show what shard folders hold."""

import argparse

from megalm.command_line import count
from megalm.data.corpus import listed
from megalm.data.index import ShardReader
from megalm.errors import main_guard
from megalm.tokenizer.load import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="for example OUTPUT/train")
    parser.add_argument("--tokenizer", metavar="PATH", help="print documents as text; must be the one of the shards")
    parser.add_argument("--documents", type=count, default=3, metavar="N", help="documents to print (default: 3)")
    parser.add_argument("--characters", type=count, default=300, metavar="N", help="of each document (default: 300)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare checksums")
    arguments = parser.parse_args()
    tokenizer = load(arguments.tokenizer) if arguments.tokenizer else None
    for folder in arguments.folders:
        reader = ShardReader(folder, tokenizer, arguments.verify)
        show(reader)
        if tokenizer is not None:
            shown = min(arguments.documents, reader.documents)
            for number in (i * reader.documents // shown for i in range(shown)):
                ids = reader.document(number)
                print(f"--- document {number:,}, {len(ids):,} tokens")
                print(tokenizer.decode(ids[: arguments.characters])[: arguments.characters])


def show(reader: ShardReader) -> None:
    """Print the counts and fingerprints of a shard folder."""
    index = reader.index
    tokenizer = index["tokenizer"]
    size = sum(shard["bytes"] for shard in index["shards"])
    print(f"{reader.folder}")
    print(f"  documents    {reader.documents:,} (skipped: {listed(index['skipped'])})")
    print(f"  tokens       {reader.tokens_total:,}, {reader.tokens_total / reader.documents:,.0f} per document")
    print(f"  shards       {len(index['shards'])}, {size / 2**20:,.1f} MiB, {reader.dtype.name}")
    print(f"  fingerprint  {reader.fingerprint}")
    print(f"  tokenizer    {tokenizer['kind']}, {tokenizer['vocab_size']} ids, {tokenizer['fingerprint']}")


if __name__ == "__main__":
    main_guard(main)
