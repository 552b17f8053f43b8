"""Kill runs at random moments, start them again, and count what was lost: python tests/training/deaths.py --runs 200

A run of eight steps dies once or twice: by SIGKILL, SIGTERM, SIGINT or an exception, on any rank, before, in or after
any of the places below. Started again it must end with the records of a run that nothing happened to, and with the same
weights and moments, bit for bit; at no moment may a checkpoint that stood be gone or damaged.

With --move every start is in another layout, drawn anew; the samples must be the same and the curve within summation
order of one process's.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())

from megalm.checkpoint import folder as checkpoints
from tests.distributed.ranks import RankFailed, run_ranks
from tests.training.runs import curve, state, train_run

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "exception")
PLACES = (
    "first batch",
    "mid-step",
    "between steps",
    "evaluation",
    "copy for a checkpoint",
    "temporary folder",
    "shards",
    "manifest",
    "rename",
    "latest",
    "retention",
)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, ZeRO 0": (1, {"zero": 0}),
    "data 2, ZeRO 1": (2, {"zero": 1}),
    "data 2, ZeRO 2": (2, {"zero": 2}),
    "data 2, ZeRO 3": (2, {"zero": 3}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2": (2, {"tensor": 2, "sequence_parallel": True}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
}
SECTIONS = {"checkpoint": {"every": 2, "keep_last": 2}, "evaluate": {"every": 3, "sequences": 8}}


@dataclass(frozen=True)
class Death:
    """Given the Run before its first step, makes it die: at the `count`-th time that rank comes to `place`."""

    kind: str
    place: str
    when: str
    """before or after what happens there"""
    count: int
    rank: int

    def __call__(self, run: Any) -> None:
        from megalm.checkpoint import manifest, tensors
        from megalm.data.loader import Loader
        from megalm.training.callbacks.garbage import GarbageCollection

        where: dict[str, tuple[Any, str]] = {
            "first batch": (Loader, "__next__"),
            "mid-step": (run.engine, "_train"),
            "between steps": (GarbageCollection, "after_step"),
            "evaluation": (run.engine, "_forward"),
            "copy for a checkpoint": (tensors.Snapshot, "take"),
            "temporary folder": (checkpoints, "recover"),
            "shards": (tensors, "_blocks"),
            "manifest": (manifest, "write"),
            "rename": (checkpoints.Path, "rename"),
            "latest": (checkpoints.Path, "replace"),
            "retention": (checkpoints, "_delete"),
        }
        if run.groups.rank == self.rank:
            owner, name = where[self.place]
            setattr(owner, name, self._dying(getattr(owner, name)))

    def _dying(self, right: Callable[..., Any]) -> Callable[..., Any]:
        seen = 0

        def halfway(*arguments: Any, **options: Any) -> Iterator[Any]:
            nonlocal seen
            seen += 1
            for block in right(*arguments, **options):
                yield block
                if seen == self.count:
                    self._die()

        def work(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen != self.count:
                return right(*arguments, **options)
            if self.when == "before":
                self._die()
            result = right(*arguments, **options)
            if self.when == "after":
                self._die()
            return result

        return halfway if self.place == "shards" else work

    def _die(self) -> None:
        if self.kind == "exception":
            raise RuntimeError("planted death")
        os.kill(os.getpid(), getattr(signal, self.kind))


def draw(chance: random.Random, ranks: int) -> Death:
    place = chance.choice(PLACES)
    # The folder is rank 0's to make and put in place; the others come to what all ranks do.
    everywhere = place in ("first batch", "mid-step", "between steps", "evaluation", "copy for a checkpoint", "shards")
    return Death(
        kind=chance.choice(KINDS),
        place=place,
        when=chance.choice(("before", "after")),
        count=1 if place == "first batch" else chance.randint(1, 4),
        rank=chance.randrange(ranks) if everywhere else 0,
    )


def die_and_come_back(tree: dict[str, Any], layouts: list[str], deaths: list[Death]) -> list[str]:
    """Start the run with each death in turn, then without, each time in the next of `layouts`; how each start ended."""
    ends = []
    directory = Path(tree["run"]["directory"]) / "checkpoints"
    for death, name in zip(deaths, layouts, strict=False):
        before = checkpoints.newest(directory)
        ranks, parallel = LAYOUTS[name]
        try:
            ends.append(str(run_ranks(ranks, train_run, tree | {"parallel": parallel}, death, timeout=120)[0]))
        except RankFailed as error:
            ends.append("killed" if "died without a word" in str(error) else "raised")
            assert ends[-1] == "killed" or "planted death" in str(error), error
        for step in checkpoints.steps(directory):
            checkpoints.verify(directory / f"step-{step}", checkpoints.Alone())
        newest = checkpoints.newest(directory)
        assert before is None or newest is not None, f"{before} was lost"
        assert before is None or int(newest.name[5:]) >= int(before.name[5:]), f"{before} was lost"
    ranks, parallel = LAYOUTS[layouts[-1]]
    assert run_ranks(ranks, train_run, tree | {"parallel": parallel}, timeout=120) == [0] * ranks
    return ends


def compare(tree: dict[str, Any], whole: dict[str, Any], *, moved: bool = False) -> str | None:
    """What the run that died lost against the one that did not, or None. moved: it changed its layout."""
    steps = tree["train"]["steps"]
    if moved:
        return _apart(curve(tree), curve(whole))
    if curve(tree) != curve(whole):
        return "another curve"
    ours, theirs = state(tree, steps), state(whole, steps)
    if ours.keys() != theirs.keys() or not all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()):
        return "other weights or moments"
    if left := [path.name for path in (Path(tree["run"]["directory"]) / "checkpoints").glob(".*")]:
        return f"left behind: {left}"
    return None


def _apart(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    for key in ("step", "samples", "tokens", "lr", "applied"):
        if [record[key] for record in ours] != [record[key] for record in theirs]:
            return f"another {key}"
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        if off := [a["step"] for a, b in zip(ours, theirs, strict=True) if abs(a[key] / b[key] - 1) > tolerance]:
            return f"another {key} at step {off[0]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--move", action="store_true", help="start in another layout each time")
    parser.add_argument("--output", type=Path, help="JSON of the counts")
    arguments = parser.parse_args()
    from tests.training.conftest import build_corpus, tree_of

    chance = random.Random(arguments.seed)
    started, losses = time.time(), []
    died: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = build_corpus(Path(folder))
        wholes = {}
        for number in range(arguments.runs):
            count = chance.choice((1, 1, 2))
            if arguments.move:
                names = [chance.choice(sorted(LAYOUTS)) for _ in range(count + 1)]
                name = "one rank, ZeRO 0"
            else:
                name = chance.choice(sorted(LAYOUTS))
                names = [name] * (count + 1)
            if name not in wholes:
                ranks, parallel = LAYOUTS[name]
                wholes[name] = tree_of(corpus, Path(folder) / f"whole {name}", **SECTIONS, parallel=parallel)
                assert run_ranks(ranks, train_run, wholes[name]) == [0] * ranks
            tree = tree_of(corpus, Path(folder) / "run", **SECTIONS)
            deaths = [draw(chance, LAYOUTS[each][0]) for each in names[:-1]]
            try:
                ends = die_and_come_back(tree, names, deaths)
                lost = compare(tree, wholes[name], moved=arguments.move)
            except (AssertionError, RankFailed) as error:
                ends, lost = [], f"{type(error).__name__}: {error}"
            for death, end in zip(deaths, ends, strict=False):
                if end != "0":  # it never came to that place as often as asked
                    died[death.kind, death.place] += 1
            if lost:
                losses.append(f"{names}, {deaths}: {lost}")
                print(f"LOST: {losses[-1]}", flush=True)
            shutil.rmtree(Path(folder) / "run", ignore_errors=True)
            rate = (time.time() - started) / (number + 1)
            print(
                f"{number + 1}/{arguments.runs} runs, {sum(died.values())} deaths, {len(losses)} losses, "
                f"{rate * (arguments.runs - number - 1):.0f} s left",
                flush=True,
            )
    print(f"\n{'died':24}" + "".join(f"{kind:>11}" for kind in KINDS))
    for place in PLACES:
        print(f"{place:24}" + "".join(f"{died[kind, place]:>11}" for kind in KINDS))
    print(f"{arguments.runs} runs, {sum(died.values())} deaths, {len(losses)} losses")
    if arguments.output:
        table = {place: {kind: died[kind, place] for kind in KINDS} for place in PLACES}
        arguments.output.write_text(
            json.dumps({"runs": arguments.runs, "losses": losses, "deaths": table}, indent=1) + "\n"
        )
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
