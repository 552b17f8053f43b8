"""Turn a published format of labelled data into rows for fine-tuning (JSONL), with a share held out."""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megalm.errors import MegalmError, main_guard, writing
from megalm.sft import formats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(f"{name:17} {' '.join((read.__doc__ or '').split())}"
                                                      for name, read in formats.FORMATS.items()))  # fmt: skip
    parser.add_argument("format", choices=formats.FORMATS)
    parser.add_argument("inputs", nargs="*", type=Path, help="files; .gz is read in text formats")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="train.jsonl, held_out.jsonl go here")
    parser.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--names", type=Path, metavar="FILE", help="tsv: names of the classes, one a line, where the "
                        "data holds their numbers")  # fmt: skip
    parser.add_argument("--header", choices=formats.HEADERS, help="tsv, conll: what becomes of each file's first "
                        "line; by default it is refused if it looks like a header")  # fmt: skip
    given = parser.parse_args()
    if not 0 <= given.held_out < 1:
        raise MegalmError(f"--held-out {given.held_out} is not a share from 0 to below 1: 0.1 is a usual one")
    if bool(given.inputs) == given.format.startswith("python-"):
        way = "no files: leave them out" if given.inputs else "files: name at least one"
        raise MegalmError(f"the format {given.format} is read from {way}")
    options: dict[str, Any] = {}
    if given.header:
        if given.format not in ("tsv", "conll"):
            raise MegalmError(f"--header belongs to the formats tsv and conll, and not to {given.format}: leave it out")
        options["header"] = given.header
    if given.names:
        if given.format != "tsv":
            raise MegalmError(f"--names belongs to the format tsv, and {given.format} holds names itself: leave it out")
        options["names"] = [line.strip() for _, line in formats.read_lines(given.names) if line.strip()]
    counts = {"train": 0, "held_out": 0}
    rows = formats.FORMATS[given.format](given.inputs, **options)
    # The second file would be left empty by a share of 0.
    names = ["train", "held_out"] if given.held_out else ["train"]
    partial = {name: given.output / f".{name}.partial" for name in names}
    with writing(given.output):
        given.output.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as open_files:
                streams = {n: open_files.enter_context(path.open("w", encoding="utf-8")) for n, path in partial.items()}
                for row in rows:
                    name = "held_out" if formats.is_held_out(row, given.held_out) else "train"
                    streams[name].write(json.dumps(row, ensure_ascii=False) + "\n")
                    counts[name] += 1
            if not counts["train"]:
                where = ", ".join(map(str, given.inputs)) or "the Python installation"
                raise MegalmError(
                    f"a --held-out of {given.held_out} leaves nothing to train on: lower it"
                    if counts["held_out"]
                    else f"{where} holds no row: name files with rows in the format {given.format}"
                )
            for name, path in partial.items():
                path.replace(given.output / f"{name}.jsonl")
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)
    print(f"{given.output}: {counts['train']:,} rows to train on, {counts['held_out']:,} held out")


if __name__ == "__main__":
    main_guard(main)
