"""Show what a run trains on at a step: the documents of each row, and which of their tokens are trained.

On a terminal trained text is green and bold, control tokens are reversed, and what is only read is dim; elsewhere
trained text stands in [[ ]] and a control token in < >, so that what was typed and what is one can be told apart.
"""

import argparse
import sys
from itertools import groupby

import numpy as np

from megalm.command_line import count
from megalm.config import load
from megalm.data.batch import Batch
from megalm.data.examples import Rows
from megalm.errors import MegalmError, main_guard
from megalm.sft.open import open_task
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load as load_tokenizer
from megalm.training.config import RunConfig
from megalm.training.samples import open_samples

COLOURS = {
    (True, False): "\033[1;32m",
    (True, True): "\033[1;7;32m",
    (False, False): "\033[2m",
    (False, True): "\033[7m",
}
"""Of (trained, control) text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="of the run; nothing is written in its folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeatable")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="of the run, from 1 (default: 1)")
    parser.add_argument("--rows", type=count, default=4, metavar="N", help="of the step's batch (default: 4)")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")
    given = parser.parse_args()
    if given.step < 1:
        raise MegalmError(f"--step {given.step} is not 1 or more: the first step of a run is 1")
    config = load(given.config, RunConfig, given.set)
    tokenizer = load_tokenizer(config.data.tokenizer)
    length = config.train.sequence_length
    task = open_task(config.task, config.data, tokenizer, length) if config.task else None
    samples = open_samples(config, tokenizer, task)
    colour = sys.stdout.isatty() if given.colour == "auto" else given.colour == "always"
    size = config.train.global_batch_size
    numbers = np.arange(min(size, given.rows)) + (given.step - 1) * size
    for number, corpus, sample in zip(numbers, *samples.order(config.run.seed, config.data.shuffle)(numbers)):
        row = int(corpus), int(sample)
        origins = []
        if isinstance(samples, Rows):
            examples = samples.sets[row[0]]
            origins = [
                "{} {}".format(*examples.origin(example)) for example, _, _ in samples.examples_in(row[1], row[0])
            ]
        source = config.data.sources[row[0]].path
        show(samples.batch([row], np.array([number])), tokenizer, origins, f"sample {number:,} of {source}", colour)


def show(batch: Batch, tokenizer: Tokenizer, origins: list[str], title: str, colour: bool) -> None:
    """Print a batch of one row, document by document. origins: where each document came from, if that is known."""
    ids, labels, mask, segments = (
        array[0] for array in (batch.tokens, batch.labels, batch.loss_mask, batch.segment_ids)
    )
    documents = [np.flatnonzero(segments == number) for number in range(segments[-1] + 1)]
    if not mask[documents[-1]].any() and len(documents) > max(1, len(origins)):
        padding = len(documents.pop())
    else:
        padding = 0
    print(f"--- {title}: {len(ids)} positions, {int(mask.sum())} trained, {padding} of padding")
    for number, here in enumerate(documents):
        where = f" ({origins[number]})" if number < len(origins) else ""
        print(f"document {number + 1}{where}, {len(here)} positions, {int(mask[here].sum())} trained:")
        says_next = labels.ndim == 1 and (labels[here[:-1]] == ids[here[1:]]).all()
        if says_next:
            # What a position says is the next token, so that one is shown as trained.
            shown = [*ids[here].tolist(), int(labels[here[-1]])] if mask[here[-1]] else ids[here].tolist()
            trained = [False, *(mask[here] > 0).tolist()]
            print(written(tokenizer, shown, trained[: len(shown)], colour))
        else:
            print(written(tokenizer, ids[here].tolist(), (mask[here] > 0).tolist(), colour))
            said = {tuple(np.atleast_1d(labels[place]).tolist()) for place in here if mask[place]}
            print(f"labels: {', '.join(' '.join(map(str, label)) for label in sorted(said))}")


def written(tokenizer: Tokenizer, ids: list[int], trained: list[bool], colour: bool) -> str:
    """The text of ids, with what is trained told from what is not, and control tokens from text."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    parts = []
    for learned, group in groupby(zip(ids, trained), key=lambda item: item[1]):
        inside = ""
        for control, members in groupby(group, key=lambda item: item[0] in names):
            tokens = [i for i, _ in members]
            text = "".join(f"<{names[i]}>" for i in tokens) if control and not colour else (
                "".join(names[i] for i in tokens) if control else tokenizer.decode(tokens)
            )  # fmt: skip
            inside += f"{COLOURS[learned, control]}{text}\033[0m" if colour else text
        parts.append(f"[[{inside}]]" if learned and not colour else inside)
    return "".join(parts)


if __name__ == "__main__":
    main_guard(main)
