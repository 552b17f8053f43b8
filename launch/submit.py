"""A job for Slurm: the command line that submits one of the scripts in slurm/, printed or run."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from launch import site as sites
from launch.site import Site
from launch.target import REPOSITORY, Target
from megalm.errors import MegalmError
from megalm.metrics.events import LAUNCHER, write_event


@dataclass(frozen=True)
class Submission:
    """One job. script: of slurm/. arguments: the script's. chain: jobs in a row, each continuing the one before, where
    requeueing is not allowed. environment: what the launcher in the job reads beside its own arguments."""

    target: Target
    script: str
    arguments: list[str]
    site: Site
    chain: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return self.site.nodes or 1

    @property
    def ranks_per_node(self) -> int:
        return self.site.ranks_per_node or self.site.gpus_per_node or 1

    def command(self, after: str | None = None) -> list[str]:
        """sbatch's command line. after: the job that must have ended first."""
        given = self.site
        options = {
            "job-name": self.target.folder.name,
            "nodes": str(self.nodes),
            "gpus-per-node": str(given.gpus_per_node) if given.gpus_per_node else None,
            "partition": given.partition,
            "account": given.account,
            "time": given.time,
            "output": str(self.target.folder / "logs" / "slurm-%j.log"),
            "dependency": f"afterany:{after}" if after else None,
        }
        named = [f"--{name}={value}" for name, value in options.items() if value is not None]
        more = [*(["--no-requeue"] if self.chain > 1 else []), *given.sbatch]
        return ["sbatch", "--parsable", *named, *more, self.script, *self.arguments]

    def spelled(self) -> str:
        """The command lines as a shell takes them."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines, after = [], None
        for number in range(self.chain):
            lines.append(" ".join([*variables, shlex.join(self.command(after))]))
            after = f"JOB{number + 1}"
        return "\n".join(lines)


def submission(
    target: Target, arguments: list[str], overrides: list[str], *, chain: int = 1, profile: str | None = None
) -> Submission:
    """The job that trains `target`, after its config was held against the ranks that it will have.

    arguments: of slurm/pretrain.sh or sft.sh. overrides: of the site profile, as KEY=VALUE.
    Raises MegalmError if the config cannot run on so many ranks.
    """
    if chain > 1:
        overrides = [*overrides, "supervise.requeue=never"]
    environment = {}
    if profile := profile or os.environ.get(sites.PROFILE):
        environment[sites.PROFILE] = str(Path(profile).resolve())
    site = sites.of_environment({**os.environ, **environment}, tuple(overrides))
    # sbatch itself takes most; what the launcher in the job asks for goes through the environment.
    inside = ("container", "srun", "ranks_per_node", "supervise", "environment")
    if needed := [line for line in overrides if line.partition("=")[0].strip().split(".")[0] in inside]:
        environment[sites.OVERRIDES] = "\n".join(needed)
    assert target.config is not None
    name = "sft.sh" if target.config.task is not None else "pretrain.sh"
    script = f"slurm/{name}" if Path("slurm", name).is_file() else str(REPOSITORY / "slurm" / name)
    made = Submission(target, script, arguments, site, chain, environment)
    if problem := target.problem(made.nodes * made.ranks_per_node):
        raise MegalmError(problem)
    return made


def submit(made: Submission) -> list[str]:
    """Submit by sbatch. Returns the numbers of the jobs. Raises MegalmError if there is none, or it refuses."""
    if shutil.which("sbatch") is None:
        raise MegalmError("sbatch is not on this machine: run this on a login node, or use launch local")
    (made.target.folder / "logs").mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    for _ in range(made.chain):
        command = made.command(jobs[-1] if jobs else None)
        ended = subprocess.run(command, env=os.environ | made.environment, capture_output=True, text=True)
        if ended.returncode:
            words = re.sub(r"sbatch: ((error|fatal): )?", "", ended.stderr.strip()).splitlines() or ["no reason given"]
            raise MegalmError(f"sbatch refused the job ({words[-1]}): {shlex.join(command)}")
        jobs.append(ended.stdout.strip().split(";")[0])
        write_event(made.target.folder / LAUNCHER, "submitted", job=jobs[-1], command=shlex.join(command))
    return jobs
