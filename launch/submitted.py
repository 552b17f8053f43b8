"""A job by submitit: the same supervisor and agents, in the tasks that submitit starts; it requeues by itself."""

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import job, slurm, snapshot
from launch.agent import TOKEN, serve
from launch.site import Site
from launch.submit import Submission
from launch.supervisor import Supervisor, agent_command, python_path
from launch.target import of_command
from megalm.errors import MegalmError
from megalm.metrics.events import LAUNCHER, write_event

WARNING = 120
"""Seconds before the time limit at which a job is told to save, as slurm/*.sh ask for too."""


class Submitted:
    """What submitit runs, one task per node: task 0 supervises, every task is an agent."""

    def __init__(self, arguments: list[str], site: Site, ranks_per_node: int):
        self._arguments, self._site, self._ranks = arguments, site, ranks_per_node
        self._token = secrets.token_hex(16)
        self._supervisor: Supervisor | None = None

    def __call__(self) -> int:
        number, task = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_PROCID", "0"))
        names = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])
        address = f"{names[0]}:{20000 + int(number) % 20000}"
        os.environ[TOKEN] = self._token
        if task:
            return serve(address, os.environ.get("SLURMD_NODENAME", names[task]))
        target = of_command(self._arguments, Path("runs/jobs") / number)
        if target.is_done:
            return job.done_already(target, number)
        folder = target.folder / "launch" / f"{number}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        snapshot.take(target, folder, names, slurm.call("scontrol", "write", "batch_script", number, "-"))
        log = slurm.job(number).get("StdOut", "")
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        write_event(target.folder / LAUNCHER, "job", job=number, start=start, nodes=names, log=log)
        supervisor = self._supervisor = Supervisor(
            target,
            self._site.supervise,
            nodes=names,
            ranks_per_node=self._ranks,
            folder=folder,
            environment=python_path(dict(os.environ)) | self._site.environment,
            failures=job.failures(target, number),
            fruitless=job.fruitless(target, number),
            port=int(address.rpartition(":")[2]),
            token=self._token,
        )

        def start_agents() -> subprocess.Popen[bytes]:
            # Of this node; those of the others are tasks of their own.
            return subprocess.Popen(
                agent_command("", address), env=python_path(dict(os.environ)), start_new_session=True
            )

        return supervisor.run(start_agents)

    def checkpoint(self) -> Any:
        """Called by submitit in its signal handler, which requeues the job afterwards: save first."""
        import submitit

        if self._supervisor is not None:
            self._supervisor.drain()
            self._supervisor.note_stop(signal.SIGUSR2)
        return submitit.helpers.DelayedSubmission(Submitted(self._arguments, self._site, self._ranks))


def submit(made: Submission, *, dry_run: bool = False) -> str:
    """Submit by submitit. Returns what to print: the number of the job, or of a dry run the batch script.

    Raises MegalmError without submitit, and without a time limit, which submitit counts itself.
    """
    try:
        import submitit
    except ImportError:
        raise MegalmError("--by submitit needs the package submitit: pip install 'megalm[slurm]'") from None
    site = made.site
    if site.time is None:
        raise MegalmError("--by submitit needs a time limit, by which it knows a preemption: give --time")
    folder = made.target.folder / "logs"
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1000)
    given = {"partition": site.partition, "account": site.account, "gpus_per_node": site.gpus_per_node or None}
    container = [f"--container-image={site.container}"] if site.container else []
    executor.update_parameters(
        job_name=made.target.folder.name,
        nodes=made.nodes,
        ntasks_per_node=1,
        exclusive=True,
        time=slurm.minutes(site.time),
        signal_delay_s=WARNING,
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=0", *container, *site.srun],
        **{name: value for name, value in given.items() if value is not None},
    )
    if dry_run:
        return str(executor._make_submission_file_text(f"{sys.executable} -u -m submitit.core._submit {folder}", "job"))
    folder.mkdir(parents=True, exist_ok=True)
    submitted = executor.submit(Submitted(made.target.arguments, site, made.ranks_per_node))
    write_event(made.target.folder / LAUNCHER, "submitted", job=submitted.job_id, command="submitit")
    return f"submitted job {submitted.job_id}: python -m launch status {made.target.folder}"
