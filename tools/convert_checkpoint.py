"""Convert a checkpoint into a Hugging Face folder, or back."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalm.errors import MegalmError, main_guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    there = directions.add_parser("to-hf", help="a checkpoint of any layout -> a folder that transformers loads")
    there.add_argument("source", type=Path, metavar="CHECKPOINT", help="run folder (its newest) or .../step-N")
    there.add_argument("--dtype", choices=["bf16", "fp32", "fp16"], help="default: that of the run's forward pass")
    there.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    there.add_argument(
        "--adapter", action="store_true", help="write the adapters alone, for peft; by default they are merged"
    )
    back = directions.add_parser("from-hf", help="a Hugging Face folder -> a checkpoint of step 0")
    back.add_argument("source", type=Path, metavar="DIR", help="folder with config.json and safetensors files")
    for direction in (there, back):
        direction.add_argument("output", type=Path, metavar="OUT", help="folder to write; must not exist")
        direction.add_argument("--tokenizer", type=Path, metavar="PATH", help="where it is, if not where it is known")
        direction.add_argument("--no-verify", action="store_true", help="do not compare the logits with transformers'")
        direction.add_argument(
            "--workers",
            type=int,
            default=min(4, os.cpu_count() or 1),
            metavar="N",
            help="threads (default: %(default)s)",
        )
    arguments = parser.parse_args()

    bar = Bar()
    shared: dict[str, Any] = {"workers": max(1, arguments.workers), "report": bar}
    if getattr(arguments, "adapter", False):
        for unused in ("dtype", "max_shard_size", "tokenizer", "no_verify"):
            if getattr(arguments, unused) != there.get_default(unused):
                raise MegalmError(
                    f"--adapter writes the adapters alone, in fp32 and one file: leave out --{unused.replace('_', '-')}"
                )
        from megalm.convert.adapter import to_peft

        written = to_peft(arguments.source, arguments.output, **shared)
        bar.close()
        print(f"{arguments.output}: adapters for peft, {written / 1e6:.2f} MB")
        return
    from megalm.convert.conversion import from_hf, to_hf  # imports torch, which takes seconds

    started = time.monotonic()
    shared |= {"tokenizer": arguments.tokenizer, "verify": not arguments.no_verify}
    if arguments.direction == "to-hf":
        done = to_hf(
            arguments.source,
            arguments.output,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            **shared,
        )
    else:
        done = from_hf(arguments.source, arguments.output, **shared)
    bar.close()
    verdict = done.verdict
    proof = f"logits differ from transformers' by at most {verdict.difference:.1e}" if verdict else "not verified"
    print(
        f"{arguments.output}: {done.architecture.model_type}, {done.config.num_parameters():,} parameters, "
        f"{done.bytes / 1e9:.2f} GB; {proof}; in {time.monotonic() - started:.1f} s"
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)


class Bar:
    """A bar per phase, on a terminal only."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            self._bar = tqdm(
                desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    main_guard(main)
