"""The same recipe as jobs of Slurm: an array per phase, and the merges between them by dependency."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megalm.curate.executor import undone
from megalm.curate.plan import Plan
from megalm.errors import MegalmError

SCRIPT = "slurm/curate.sh"


def commands(
    config: str, plan: Plan, jobs: int, workers: int, options: Sequence[str], overrides: Sequence[str] = ()
) -> list[list[str]]:
    """sbatch's command lines of what is still to be done, each to begin when the one before has succeeded.

    jobs: elements of an array, at most. workers: processes of each. options: more of sbatch's, such as
    --partition=NAME. overrides: --set KEY=VALUE.
    """
    script = str(_home() / SCRIPT)
    logs = plan.folder.root / "logs"
    made = []

    def add(part: str, count: int, cores: int) -> None:
        array = [f"--array=0-{count - 1}", f"--output={logs}/%x-%A_%a.log"] if count else [f"--output={logs}/%x-%j.log"]
        name = f"--job-name={plan.folder.root.name}-{part.replace(':', '-')}"
        inside = [script, config, *overrides, "--only", part, "--workers", str(cores)]
        made.append(
            ["sbatch", "--parsable", name, *array, f"--cpus-per-task={cores}", "--kill-on-invalid-dep=yes"]
            + [*options, *inside]
        )

    for number in range(len(plan.phases)):
        if number and not plan.folder.merged(number).exists():
            add(f"merge:{number}", 0, workers)
        if left := undone(plan, number):
            add(f"phase:{number}", min(jobs, -(-len(left) // workers)), workers)
    add("finish", 0, 1)
    return made


def _home() -> Path:
    """megalm's folder: the working directory, or else the one that this file lies in."""
    for folder in (Path(), Path(__file__).resolve().parents[2]):
        if (folder / SCRIPT).is_file():
            return folder
    raise MegalmError(f"there is no {SCRIPT} here: run this in megalm's folder")


def submit(made: Sequence[Sequence[str]], plan: Plan) -> list[str]:
    """Submit a chain of jobs; their numbers. Raises MegalmError with sbatch's own words."""
    (plan.folder.root / "logs").mkdir(exist_ok=True)
    # A job runs where it was submitted, so that paths mean the same, and from a copy of its script.
    environment = {"PYTHON": sys.executable} | dict(os.environ) | {"MEGALM_FOLDER": str(_home().resolve())}
    numbers: list[str] = []
    for command in made:
        after = [f"--dependency=afterok:{numbers[-1]}"] if numbers else []
        line = [*command[:2], *after, *command[2:]]
        try:
            ended = subprocess.run(line, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            raise MegalmError(
                "sbatch is not on this machine: run this on a login node, or use --executor local"
            ) from None
        if ended.returncode:
            words = ended.stderr.strip().splitlines() or ["no reason given"]
            raise MegalmError(
                f"sbatch refused the job ({words[-1].removeprefix('sbatch: ')}): {shlex.join(line)}"
                + (f"; scancel {' '.join(numbers)} ends those before it" if numbers else "")
            )
        numbers.append(ended.stdout.strip().split(";")[0])
    return numbers


def share(tasks: Sequence[int]) -> Sequence[int]:
    """Those of `tasks` that this element of an array works on: all of them outside one."""
    count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    return tasks[int(os.environ.get("SLURM_ARRAY_TASK_ID", str(first))) - first :: count]
