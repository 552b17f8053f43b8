"""Train the classifier of the curation step quality_classifier from good and bad examples."""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megalm.command_line import count
from megalm.curate.steps.quality_classifier import train
from megalm.data.corpus import JsonlReader, Tally
from megalm.disk import try_writing
from megalm.errors import main_guard, writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for which, what in (("positive", "what documents should be like"), ("negative", "what they should not be like")):
        parser.add_argument(
            f"--{which}", nargs="+", required=True, metavar="FILE", help=f"{what}: .jsonl, .jsonl.gz or .jsonl.zst"
        )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model to write, an .npz")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="key of the text in JSONL (default: text)")
    parser.add_argument(
        "--most",
        type=count,
        default=200_000,
        metavar="N",
        help="texts of each kind, which bounds memory (default: %(default)s)",
    )
    parser.add_argument("--bits", type=count, default=20, metavar="N", help="2^N weights (default: %(default)s)")
    parser.add_argument(
        "--ngrams", type=count, default=2, metavar="N", help="words in a row at most (default: %(default)s)"
    )
    parser.add_argument("--passes", type=count, default=5, metavar="N", help="over the texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of order and held-out share (default: 0)")
    arguments = parser.parse_args()

    def texts(files: list[str]) -> Iterator[str]:
        reader = JsonlReader(files, Tally(), arguments.text_field)
        return islice((document.text for document in reader), arguments.most)

    with writing(arguments.output):
        try_writing(arguments.output)
    started = time.monotonic()
    model, scores = train(
        texts(arguments.positive), texts(arguments.negative), bits=arguments.bits, longest=arguments.ngrams,
        passes=arguments.passes, seed=arguments.seed,
    )  # fmt: skip
    with writing(arguments.output):
        model.save(arguments.output)
    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    print(f"{arguments.output}: on held-out texts ({told}), in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main_guard(main)
