"""Write docs/support.md, what is proved of every layout, from the results of the equality matrix."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from megalm.errors import MegalmError, main_guard
from megalm.parallel.proved import AXES, FEATURES, SEPARATOR, proved

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RESULTS = DOCS / "support.md", DOCS / "support.json"

HEADER = """\
# What is proved

One config and one seed train the same model under every layout. That is not believed but tried: a layout is *proved* if
training under it was held against one process of plain torch (no DeepSpeed, no megatron-core, no micro-batches) and
agreed in

- the weights of step 0, to the bit, on every rank;
- the samples of every step, each exactly once over the data-parallel ranks;
- the loss and gradient norm of every step, and every gradient of the first;
- weights and both AdamW moments after the last step;
- whatever several ranks hold a copy of, to the bit.

Tried were {cases},
over {layouts} combinations of degrees of pipeline, data and tensor parallelism on up to 8 ranks, with uneven and empty
loss masks, empty ranks, a vocabulary that the tensor degree does not divide and stages of unequal length, on CPU ranks
with the real engines ({versions}).
`make test` repeats a part that has every pair of choices in it, over gloo; `make test-matrix` repeats all of it, over
shared memory, whose collectives are held against gloo's. Both are tried on planted bugs. Degrees are not part of what
is proved: a layout of 512 ranks does what one of 8 does, with more of them.

A config is refused, before anything is allocated, unless its layout is in the first table below and its model and data
are in the second. `parallel.allow_unproved: true` runs it nevertheless, and the run's log says so. What kernels compute
(`model.attention_backend`, norms, `optimizer.implementation`, a GPU's anything) is not decided here: each kernel has
its own self-check at the start of a run. What `deepspeed:` passes through is the user's.

This page is written by `python tools/write_support_docs.py` from docs/support.json and megalm/parallel/proved.json,
which `make test-matrix` writes.
"""

DISTANCES = """
## How close

Numbers that cannot be equal to the bit, because layouts sum in different orders, are compared with the same training in
fp64. How far from it a layout may be is measured, not chosen: references in the run's precision that differ only in the
order of their sums are held against fp64 too, and a layout may be 4 times as far as the farthest of them, tensor by
tensor (tests/distributed/comparison.py). For each quantity, the case that came closest to its tolerance:

| Precision | Quantity | Distance from fp64, relative | Tolerance | Share of it |
| --- | --- | --- | --- | --- |
"""

LAYOUTS = """
## Layouts

Precisions in which every recomputation (none, selective, full) is proved, with one micro-batch per step and with
several; `several` means that one micro-batch is not legal there, `-` that nothing is.

"""

FEATURES_INTRODUCTION = """
## Features of model and data

Under which values of each axis a feature is proved. Those that are not named cannot have it: one stage is never uneven,
one tensor rank never has fewer key-value heads than ranks.

"""

REFUSED = """
## Refused

Combinations that the matrix asked for and megalm refuses, each with how many layouts it stands for:

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    arguments = parser.parse_args()
    if not RESULTS.exists():
        raise MegalmError("there is no docs/support.json to write the page from: run `make test-matrix` first")
    page = render(json.loads(RESULTS.read_text(encoding="utf-8")))
    if arguments.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        raise SystemExit("docs/support.md is not current: run `python tools/write_support_docs.py` and commit it")
    PAGE.write_text(page, encoding="utf-8")
    return 0


def render(results: dict[str, Any]) -> str:
    """The whole page."""
    cases = ", ".join(
        f"{count:,} of the {results['legal'][precision]:,} legal cases in {precision}"
        for precision, count in sorted(results["cases"].items())
    )
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    page = HEADER.format(cases=cases, layouts=results["layouts"], versions=versions) + DISTANCES
    for precision, quantities in sorted(results["closest"].items()):
        for quantity, found in sorted(quantities.items()):
            share = found["distance"] / found["tolerance"]
            page += f"| {precision} | {quantity} | {found['distance']:.1e} | {found['tolerance']:.1e} | {share:.0%} |\n"
    page += LAYOUTS + layouts() + FEATURES_INTRODUCTION + features() + REFUSED
    for refused in sorted(results["refused"], key=lambda refused: (-refused["layouts"], refused["sentence"])):
        page += f"- {refused['layouts']:,}: {refused['sentence']}\n"
    page += "\n## Not proved\n\n"
    if not results["failed"]:
        page += "Nothing that megalm's config lets pass was found to differ.\n"
    for name, problems in sorted(results["failed"].items()):
        page += f"- `{name}`: {'; '.join(line for lines in problems.values() for line in lines[:1])}\n"
    return page


def layouts() -> str:
    """Rows of tensor x pipeline x data, columns of ZeRO stage x offload."""
    signatures = [dict(zip(AXES, name.split(SEPARATOR), strict=True)) for name in sorted(proved().signatures)]
    rows = sorted({(s["tensor"], s["pipeline"], s["data"]) for s in signatures})
    columns = sorted({(s["zero"], s["offload"]) for s in signatures})
    titles = [f"ZeRO {zero}{', offload' if offload == 'on' else ''}" for zero, offload in columns]
    table = _row("Tensor", "Pipeline", "Data", *titles) + _row(*["---"] * (3 + len(titles)))
    for row in rows:
        cells = []
        for zero, offload in columns:
            here = [
                (s["precision"], s["recompute"], s["accumulation"])
                for s in signatures
                if (s["tensor"], s["pipeline"], s["data"], s["zero"], s["offload"]) == (*row, zero, offload)
            ]
            cells.append(_cell(set(here)))
        table += _row(*row, *cells)
    return table


def _cell(here: set[tuple[str, str, str]]) -> str:
    """Precisions whose recomputations are all proved, and with how many micro-batches."""
    said = []
    for accumulation, words in (({"1", ">1"}, ""), ({">1"}, " (several)")):
        whole = [
            precision
            for precision in ("fp32", "bf16", "fp16")
            if {(r, a) for p, r, a in here if p == precision}
            == set(itertools.product(("none", "selective", "full"), accumulation))
        ]
        if whole:
            said.append(" ".join(whole) + words)
    return ", ".join(said) or "-"


def features() -> str:
    """Rows of feature values, columns of axes."""
    pairs = [pair.split(SEPARATOR) for pair in sorted(proved().pairs)]
    everywhere = {axis: {there for _, there in pairs if there.startswith(f"{axis} ")} for axis in AXES}
    table = _row("Feature", "Value", *AXES) + _row(*["---"] * (2 + len(AXES)))
    for feature, key in FEATURES.items():
        values = sorted({pair.removeprefix(f"{feature} ") for pair, _ in pairs if pair.startswith(f"{feature} ")})
        for value in values:
            under = [there.split(" ", 1) for pair, there in pairs if pair == f"{feature} {value}"]
            cells = [[there for name, there in under if name == axis] for axis in AXES]
            said = ["all" if len(cell) == len(everywhere[axis]) else ", ".join(cell) for axis, cell in zip(AXES, cells)]
            table += _row(f"`{key}`", value, *said)
    return table


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main_guard(main)
