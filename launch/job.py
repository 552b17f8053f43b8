"""A supervised job: inside a batch script of Slurm, or on this machine alone."""

import argparse
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from launch import site as sites
from launch import slurm, snapshot
from launch.site import Site
from launch.status import jobs_of
from launch.supervisor import DONE, PREEMPTED, Supervisor, agent_command, python_path
from launch.target import Target, newest_step, of_command
from megalm.command_line import count
from megalm.errors import MegalmError
from megalm.metrics.events import LAUNCHER, Event, read_events, write_event

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""That let a job finish its step, save and end; Slurm's warning before the time limit is the last."""
_PATIENCE = 600.0
"""Seconds that Slurm may be away when a job wants to go back into the queue."""
Answer = TypeVar("Answer")


def in_slurm(arguments: list[str]) -> int:
    """What a batch script of slurm/ calls on the job's first node. arguments: SCRIPT ARGUMENT ... of every rank.

    A job that is told to end saves and puts itself back into the queue under its number, until the run is done.
    """
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        raise MegalmError("launch job runs inside a job of Slurm: submit it (launch submit), or use launch local")
    site = sites.of_environment()
    target = of_command(arguments, Path("runs/jobs") / number)
    if target.is_done:
        return done_already(target, number)
    names = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])
    ranks = _ranks_per_node(site)
    if problem := target.problem(len(names) * ranks):
        raise MegalmError(problem)
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    folder = target.folder / "launch" / f"{number}-{start}"
    with suppress(MegalmError):
        (target.folder / "launch").mkdir(parents=True, exist_ok=True)
        script = slurm.call("scontrol", "write", "batch_script", number, "-")
        snapshot.take(target, folder, names, script)
    record = _asked(slurm.job, number)
    write_event(
        target.folder / LAUNCHER, "job", job=number, start=int(start), nodes=names, log=record.get("StdOut", "")
    )
    supervisor = Supervisor(
        target,
        site.supervise,
        nodes=names,
        ranks_per_node=ranks,
        folder=folder,
        environment=site.environment,  # beside each agent's own: nodes and containers differ
        failures=failures(target, number),
        fruitless=fruitless(target, number),
        may_move=site.supervise.requeue == "auto" and record.get("Requeue") == "1",
    )
    for each in SIGNALS:
        signal.signal(each, lambda number, _: supervisor.stop(number))

    def start_agents() -> subprocess.Popen[bytes]:
        command = [*srun(site, len(names)), *agent_command("", f"{names[0]}:{supervisor.port}")]
        # In a session of its own, so that a signal to the batch script does not reach it twice.
        return subprocess.Popen(command, env=python_path(dict(os.environ)) | supervisor.secret, start_new_session=True)

    code = supervisor.run(start_agents)
    if code == PREEMPTED or supervisor.wants_other_nodes:
        return _again(target, site, number, supervisor.excluded, must_move=supervisor.wants_other_nodes)
    return code


def srun(site: Site, nodes: int) -> list[str]:
    """The start of one task on every node. The job's own options (GPUs, memory) hold for it."""
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]
    options.append("--cpu-bind=none")  # one task starts all ranks of a node, which would share its core
    container = [f"--container-image={site.container}"] if site.container else []
    return ["srun", *options, *container, *site.srun]


def failures(target: Target, job: str) -> Counter[str]:
    """How often each node failed in the starts of this job so far."""
    failed = [event for event in _events(target, job) if event["event"] == "failed"]
    return Counter(event["node"] for event in failed if event.get("node"))


def fruitless(target: Target, job: str) -> int:
    """How many attempts and starts of this job in a row have ended without a new checkpoint. Who starts it again after
    it gave up begins anew."""
    count, step = 0, 0
    for event in _events(target, job):
        if event["event"] == "gave up":
            count = 0
        elif "failures" in event:
            count, step = event["failures"], event["step"]
    return count if newest_step(target.folder) == step else 0


def _events(target: Target, job: str) -> Iterator[Event]:
    """What happened in the starts of this job so far."""
    ours = False
    for event in read_events(target.folder):
        if event["event"] == "job":
            ours = event.get("job") == job
        elif ours:
            yield event


def done_already(target: Target, job: str) -> int:
    """Say so, and note it once if no start of the run has."""
    step = newest_step(target.folder)
    print(f"launch: {target.folder} is done (step {step}): nothing is left for job {job}", flush=True)
    if not any(event["event"] == "done" and event.get("step") == step for event in read_events(target.folder)):
        write_event(target.folder / LAUNCHER, "done", step=step)
    return DONE


def _again(target: Target, site: Site, number: str, failed: list[str], *, must_move: bool) -> int:
    """Put the job back into the queue, if it is not on its way there, and nobody cancelled it; without the nodes that
    `failed` too often."""
    for ours in SIGNALS:  # with which Slurm ends all processes of a job that is requeued, those of its own commands too
        signal.signal(ours, signal.SIG_IGN)
    record = _asked(slurm.job, number)
    state, ended_by_limit = record.get("JobState"), record.get("Reason") == "TimeLimit"
    excluded = failed if must_move else _replaceable(failed, record)
    names = list(dict.fromkeys([*slurm.named(record, "ExcNodeList"), *excluded]))
    if site.supervise.requeue == "never" or record.get("Requeue") == "0":
        print(f"launch: job {number} is not requeued; the next job of its chain goes on", flush=True)
        waiting = [each for each in jobs_of(target.folder) if _asked(slurm.job, each).get("JobState") == "PENDING"]
    elif state == "RUNNING" or ended_by_limit:
        write_event(target.folder / LAUNCHER, "requeued", job=number, excluded=excluded)
        print(f"launch: requeueing job {number}" + (f" without {', '.join(excluded)}" if excluded else ""), flush=True)
        # From here on Slurm kills this script when KillWait is over.
        _asked(slurm.requeue, number)
        waiting = [number]
    else:
        waiting = [number] if state == "PENDING" else []  # somebody else has requeued it
    if excluded:
        for each in waiting:  # Slurm takes it of no others
            _asked(slurm.exclude, each, names)
    return PREEMPTED


def _replaceable(failed: list[str], record: dict[str, str]) -> list[str]:
    """`failed` if others can take their place, else none of them: the supervisor can leave a node out, which is better
    than to wait in the queue for good. record: Slurm's of the job that ran on them."""
    if not failed:
        return []
    needed = int(record["NumNodes"].partition("-")[0])
    if set(failed) & set(slurm.named(record, "ReqNodeList")):
        why = "the job asks for them by name"
    elif len(slurm.nodes_up(record["Partition"]) - set(failed)) < needed:
        why = f"fewer than {needed} other nodes are up"
    else:
        return failed
    print(f"launch: {', '.join(failed)} may be given again: {why}", flush=True)
    return []


def _asked(ask: Callable[..., Answer], *arguments: Any) -> Answer:
    """What Slurm answers, asked again while it is away: a controller may be restarted at any time."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return ask(*arguments)
        except slurm.Unreachable as error:
            if time.monotonic() > deadline:
                raise
            print(f"launch: {error}; asking again", flush=True)
            time.sleep(5)


def here(target: Target, site: Site, ranks: int) -> int:
    """Run and supervise on this machine."""
    if target.is_done:
        return done_already(target, "here")
    if problem := target.problem(ranks):
        raise MegalmError(problem)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = target.folder / "launch" / f"local-{stamp}"
    try:
        snapshot.take(target, folder, [os.uname().nodename], None)
    except OSError as error:
        raise MegalmError(f"{target.folder} cannot be written ({error}): choose another run.directory") from None
    write_event(target.folder / LAUNCHER, "job", job=None, start=0, nodes=["here"], log="")
    supervisor = Supervisor(
        target,
        site.supervise,
        nodes=["here"],
        ranks_per_node=ranks,
        folder=folder,
        environment=site.environment,  # beside each agent's own: nodes and containers differ
        failures=Counter(),
        address="127.0.0.1",
    )
    for each in SIGNALS:
        signal.signal(each, lambda number, _: supervisor.stop(number))

    def start_agents() -> subprocess.Popen[bytes]:
        command = agent_command("here", f"127.0.0.1:{supervisor.port}")
        return subprocess.Popen(command, env=python_path(dict(os.environ)) | supervisor.secret, start_new_session=True)

    return supervisor.run(start_agents)


def _ranks_per_node(site: Site) -> int:
    wanted = os.environ.get("RANKS_PER_NODE")
    try:
        asked = count(wanted) if wanted else site.ranks_per_node
    except argparse.ArgumentTypeError as error:
        raise MegalmError(f"RANKS_PER_NODE: {error}") from None
    return asked or int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) or 1


def visible_gpus() -> list[str] | None:
    """Numbers or UUIDs of the GPUs that CUDA_VISIBLE_DEVICES names, if it is set; as for CUDA, -1 ends them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return list(takewhile(lambda gpu: gpu not in ("", "-1"), (each.strip() for each in visible.split(","))))


def gpus() -> int:
    """GPUs of this machine that a process may use."""
    visible = visible_gpus()
    if visible is not None:
        return len(visible)
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())
