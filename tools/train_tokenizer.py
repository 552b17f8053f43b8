"""Train a lossless sentencepiece tokenizer on corpus files."""

import argparse
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from megalm.command_line import count
from megalm.data.corpus import JsonlReader, Tally, listed
from megalm.errors import MegalmError, main_guard
from megalm.tokenizer.load import is_tokenizer
from megalm.tokenizer.train import CHAT_TOKENS, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--output", required=True, metavar="DIR", help="tokenizer folder to write")
    parser.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="ids in all (default: %(default)s)")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    parser.add_argument(
        "--special",
        nargs="*",
        default=CHAT_TOKENS,
        metavar="TOKEN",
        help="control tokens beside <unk>, <|endoftext|> and <pad> (default: %(default)s)",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="key of the text in JSONL (default: text)")
    parser.add_argument(
        "--sample-megabytes", type=count, default=100, metavar="N", help="text to train on, which bounds memory"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer of an existing folder")
    arguments = parser.parse_args()
    if is_tokenizer(arguments.output) and not arguments.overwrite:
        raise MegalmError(
            f"{arguments.output} holds a tokenizer, which shards written with it need: name another folder, or pass "
            "--overwrite to replace it"
        )

    def read_texts() -> Iterator[str]:
        tally, document = Tally(), None
        reader = JsonlReader(arguments.corpus, tally, arguments.text_field)
        with tqdm(total=reader.total_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for document in reader:
                yield document.text
                bar.update(reader.bytes_read - bar.n)
        if document is None:
            raise MegalmError(
                f"{', '.join(arguments.corpus)} holds no text to train on (skipped: {listed(tally.skipped)}): name a "
                "corpus that does, or its --text-field"
            )

    print(f"training a {arguments.model} vocabulary of {arguments.vocab_size} (reads the corpus twice, then counts)")
    started = time.monotonic()
    tokenizer = train(
        read_texts, arguments.vocab_size, arguments.model, arguments.special, arguments.sample_megabytes * 1_000_000
    )
    tokenizer.save(arguments.output)
    sample = next(read_texts())[:10_000]
    density = len(sample.encode()) / len(tokenizer.encode(sample))
    print(
        f"{arguments.output}: {tokenizer.vocab_size} ids, {density:.2f} bytes per token on the first document, "
        f"fingerprint {tokenizer.fingerprint[:12]}, in {time.monotonic() - started:.1f} s"
    )


if __name__ == "__main__":
    main_guard(main)
