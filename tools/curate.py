"""Work through a recipe: raw pages and text become a data set. Run again, it continues where it stopped."""

import argparse
import os
import shlex
import sys
import time

from megalm.command_line import count
from megalm.config import load
from megalm.curate import executor, slurm
from megalm.curate.plan import Plan, opened, prepare
from megalm.curate.recipe import Recipe
from megalm.errors import MegalmError, main_guard


def _cores() -> int:
    """Those this process may use, which a job's share of a node or a container makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="RECIPE", help="YAML file (docs/curation.md)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="default: %(default)s")
    parser.add_argument(
        "--workers", type=count, default=_cores(), metavar="N", help="processes (default: %(default)s, one per core)"
    )
    parser.add_argument("--jobs", type=count, default=16, metavar="N", help="slurm: elements of an array (default: 16)")
    parser.add_argument(
        "--sbatch",
        default="",
        metavar="OPTIONS",
        help="slurm: more options, such as --sbatch='--partition=cpu'",
    )
    parser.add_argument("--dry-run", action="store_true", help="slurm: print the jobs, submit none")
    parser.add_argument(
        "--only",
        metavar="PART",
        help="one part, as the jobs do: phase:N, merge:N (before phase N), finish; or report: how far it is",
    )
    arguments = parser.parse_args()
    recipe = load(arguments.config, Recipe, arguments.set)

    if arguments.only is not None:
        _part(opened(recipe), arguments.only, arguments.workers)
        return
    if arguments.executor == "slurm":
        plan = prepare(recipe)
        overrides = [word for each in arguments.set for word in ("--set", each)]
        made = slurm.commands(
            arguments.config, plan, arguments.jobs, arguments.workers, shlex.split(arguments.sbatch), overrides
        )
        if arguments.dry_run:
            print("\n".join(shlex.join(command) for command in made))
        else:
            print(f"{plan.folder.root}: submitted as jobs {', '.join(slurm.submit(made, plan))}")
        return
    started = time.monotonic()
    plan = executor.run(recipe, arguments.workers)
    _conclude(plan, time.monotonic() - started)


def _part(plan: Plan, part: str, workers: int) -> None:
    name, _, number = part.partition(":")
    if name == "finish" and not number:
        started = time.monotonic()
        executor.finish(plan)
        _conclude(plan, time.monotonic() - started)
    elif name == "report" and not number:
        for index, left in enumerate(executor.undone(plan, each) for each in range(len(plan.phases))):
            print(f"phase {index}: {plan.tasks - len(left)} of {plan.tasks} tasks done")
        executor.write_report(plan, executor.summarise(plan))
        print(f"report so far: {plan.folder.root / 'audit.html'}")
    elif name in ("phase", "merge") and number.isdecimal() and (name == "merge") <= int(number) < len(plan.phases):
        if name == "merge":
            executor.merge(plan, int(number))
        else:
            executor.run_phase(plan, int(number), slurm.share(range(plan.tasks)), workers)
    else:
        raise MegalmError(f"--only {part}: write phase:N or merge:N with N below {len(plan.phases)}, finish or report")


def _conclude(plan: Plan, seconds: float) -> None:
    report = executor.summarise(plan)
    malformed = sum(sum(source["malformed"].values()) for source in report["sources"].values())
    if malformed:
        print(f"{malformed:,} records could not be read: the reasons are in {plan.folder.aside}", file=sys.stderr)
    tokens = f", {report['tokens_written']:,} tokens" if report["tokens_written"] is not None else ""
    print(
        f"{plan.folder.root}: {report['documents_read']:,} documents read, {report['documents_written']:,} written"
        f"{tokens}; report: {plan.folder.root / 'audit.html'}; in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main_guard(main)
