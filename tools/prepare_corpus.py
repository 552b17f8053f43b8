"""Gather documents from files and folders, or from the Python installation, into one corpus file (JSONL)."""

import argparse
import itertools
import sys

from tqdm import tqdm

from megalm.command_line import count
from megalm.data import corpus, python_corpus
from megalm.errors import MegalmError, main_guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="*", help="files and folders: text or .jsonl, plain, .gz or .zst")
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="a .jsonl, .jsonl.gz or .jsonl.zst to write; what repeats is left out, for about 124 MB of memory per "
        "million documents",
    )
    parser.add_argument("--python", action="store_true", help="add the text of the Python installation")
    parser.add_argument(
        "--python-parts",
        nargs="+",
        choices=python_corpus.PARTS,
        default=python_corpus.DEFAULT_PARTS,
        help="what of the Python installation (default: %(default)s)",
    )
    parser.add_argument(
        "--extensions",
        nargs="+",
        default=corpus.TEXT_EXTENSIONS,
        help="files of a folder that are text (default: %(default)s); .jsonl always is",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="key of the text in JSONL (default: text)")
    parser.add_argument(
        "--max-characters",
        type=count,
        default=corpus.MAX_CHARACTERS,
        metavar="N",
        help="cut longer text files at paragraph or line ends (default: %(default)s)",
    )
    parser.add_argument("--limit-characters", type=count, metavar="N", help="stop once this much was written")
    arguments = parser.parse_args()
    if not arguments.inputs and not arguments.python:
        raise MegalmError("there is nothing to gather: name files or folders, or pass --python")

    tally = corpus.Tally()
    documents = corpus.gather(
        arguments.inputs, tally, arguments.extensions, arguments.text_field, arguments.max_characters
    )
    if arguments.python:
        documents = itertools.chain(documents, python_corpus.gather_python(tally, arguments.python_parts))
    if arguments.limit_characters is not None:
        documents = itertools.takewhile(lambda _: tally.characters < arguments.limit_characters, documents)
    with tqdm(unit=" characters", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def report(tally: corpus.Tally) -> None:
            bar.update(tally.characters - bar.n)

        corpus.write_corpus(documents, arguments.output, tally, report)
    print(f"{arguments.output}: {tally.summary()}")


if __name__ == "__main__":
    main_guard(main)
