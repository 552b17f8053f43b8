"""Train the language model of the curation step perplexity from text that documents should be like."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megalm.curate.steps.kneser_ney import KneserNey
from megalm.curate.steps.perplexity import MODEL, TOKENIZER, PerplexityModel, lines_of
from megalm.data.corpus import JsonlReader, Tally
from megalm.errors import MegalmError, main_guard
from megalm.tokenizer.load import load

EVERY, MOST_ASIDE = 20, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", nargs="+", required=True, metavar="FILE", help="good text: .jsonl, .jsonl.gz or .jsonl.zst"
    )
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="of tools/train_tokenizer.py, or another")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the model to write")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="key of the text in JSONL (default: text)")
    parser.add_argument("--order", type=int, default=5, metavar="N", help="longest n-grams (default: %(default)s)")
    parser.add_argument(
        "--prune", type=int, nargs="+", default=[0, 0, 1], metavar="N",
        help="of n-grams of length 1, 2, ..., how often one may be there at most and be left out; the last number "
        "holds for longer ones, too (default: 0 0 1)",
    )  # fmt: skip
    parser.add_argument(
        "--most-tokens", type=int, default=20_000_000, metavar="N",
        help="tokens to learn from, which bounds memory at about 0.2 KB each (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not 2 <= arguments.order <= 6:
        raise MegalmError(f"--order {arguments.order}: kenlm reads models of order 2 to 6")

    started = time.monotonic()
    tokenizer = load(arguments.tokenizer)
    aside: list[str] = []
    tally = Tally()

    def lines() -> Iterator[list[int]]:
        tokens = 0
        for number, document in enumerate(JsonlReader(arguments.corpus, tally, arguments.text_field)):
            if number % EVERY == EVERY - 1 and len(aside) < MOST_ASIDE:
                aside.append(document.text)
                continue
            for line in lines_of(document.text, tokenizer):
                yield line
                tokens += len(line) + 1
            if tokens >= arguments.most_tokens:
                return

    model = KneserNey(lines(), arguments.order, arguments.prune)
    folder = Path(arguments.output)
    tokenizer.save(folder / TOKENIZER)
    model.write(folder / MODEL)
    sizes = " ".join(f"{size:,}" for size in model.sizes)
    print(f"{folder}: n-grams of length 1 to {arguments.order}: {sizes}, in {time.monotonic() - started:.1f} s")
    written = PerplexityModel.load(folder)
    values = [value for value in map(written.perplexity, aside) if value is not None]
    if values:
        told = ", ".join(f"{share} % below {np.percentile(values, share):,.0f}" for share in (10, 33, 50, 67, 90))
        print(f"perplexities of {len(values):,} documents kept aside: {told}")


if __name__ == "__main__":
    main_guard(main)
