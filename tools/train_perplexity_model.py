"""Train the language model of the curation step perplexity from text that documents should be like."""

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megalm.curate.steps.kneser_ney import KneserNey
from megalm.curate.steps.perplexity import MODEL, TOKENIZER, PerplexityModel, lines_of
from megalm.data.corpus import JsonlReader, Tally, listed
from megalm.errors import MegalmError, main_guard
from megalm.tokenizer.base import Tokenizer
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
        help="tokens to learn from, which bounds memory at up to 0.5 KB each (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not 2 <= arguments.order <= 6:
        raise MegalmError(f"--order {arguments.order}: kenlm reads models of order 2 to 6")
    if arguments.most_tokens < 1 or min(arguments.prune) < 0:
        raise MegalmError("--most-tokens must be at least 1, and numbers of --prune at least 0")
    folder = Path(arguments.output)
    if folder.exists():
        raise MegalmError(f"{folder} is there already: remove it, or name another --output")

    started = time.monotonic()
    tokenizer = load(arguments.tokenizer)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        aside, told = _train(arguments, tokenizer, partial)
        partial.rename(folder)  # whole or not at all
    except OSError as error:
        raise MegalmError(f"cannot write {folder}: {error.strerror or error}; mend that and start again") from error
    print(f"{folder}: {told}, in {time.monotonic() - started:.1f} s")
    written = PerplexityModel.load(folder)
    values = [value for value in map(written.perplexity, aside) if value is not None]
    if values:
        shares = ", ".join(f"{share} % below {np.percentile(values, share):,.0f}" for share in (10, 33, 50, 67, 90))
        print(f"perplexities of {len(values):,} documents kept aside: {shares}")


def _train(arguments: argparse.Namespace, tokenizer: Tokenizer, folder: Path) -> tuple[list[str], str]:
    """Write the model into `folder`; documents that it has not seen, and what there is to say of it."""
    aside: list[str] = []
    tally, tokens = Tally(), 0

    def lines() -> Iterator[list[int]]:
        nonlocal tokens
        for number, document in enumerate(JsonlReader(arguments.corpus, tally, arguments.text_field)):
            if number % EVERY == EVERY - 1 and len(aside) < MOST_ASIDE:
                aside.append(document.text)
                continue
            for line in lines_of(document.text, tokenizer):
                if tokens >= arguments.most_tokens:
                    return
                tokens += len(line) + 1
                yield line

    try:
        model = KneserNey(lines(), arguments.order, arguments.prune)
    except MegalmError as error:
        raise MegalmError(f"{error} (skipped: {listed(tally.skipped)})") from None
    model.write(folder / MODEL)
    tokenizer.save(folder / TOKENIZER)
    sizes = " ".join(f"{size:,}" for size in model.sizes)
    rest = "; the rest of the corpus was not read (--most-tokens)" if tokens >= arguments.most_tokens else ""
    skipped = listed(tally.skipped)
    return aside, f"{tokens:,} tokens{rest}; skipped: {skipped}; n-grams of length 1 to {arguments.order}: {sizes}"


if __name__ == "__main__":
    main_guard(main)
