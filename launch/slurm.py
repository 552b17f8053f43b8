"""Slurm's commands, each as one function."""

import re
import shutil
import subprocess

from megalm.errors import MegalmError

PATIENCE = 60.0
"""Seconds that a command of Slurm may take: a controller that is busy answers late."""
_UNKNOWN = "Invalid job id specified"
_AWAY = re.compile("contact slurm controller|timed out|connect failure|connection refused", re.IGNORECASE)
"""What commands of Slurm say that did not reach it."""


class Unreachable(MegalmError):
    """Slurm does not answer now."""


def call(*command: str) -> str:
    """What a command of Slurm prints. Raises MegalmError with its own words if it fails, Unreachable if that is since
    Slurm does not answer."""
    if shutil.which(command[0]) is None:
        raise MegalmError(f"{command[0]} is not on this machine: run this on a login node of the cluster")
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Unreachable(
            f"{command[0]} has not answered for {PATIENCE:.0f} s: is the controller up (sinfo)?"
        ) from None
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()
        why = re.sub(rf"^({command[0]}: )?((error|fatal): )?", "", said[-1])
        kind = Unreachable if _AWAY.search(why) else MegalmError
        raise kind(f"{' '.join(command[:2])} failed ({why}): see sinfo and squeue, or the administrators")
    return ended.stdout


def job(number: str) -> dict[str, str]:
    """Slurm's record of a job, such as JobState and StdOut; empty if Slurm no longer knows it.

    Raises MegalmError if Slurm cannot be asked.
    """
    try:
        shown = call("scontrol", "--oneliner", "show", "job", number)
    except MegalmError as error:
        if _UNKNOWN in str(error):
            return {}
        raise
    return dict(re.findall(r"(\S+?)=(\S*)", shown))


def hosts(nodelist: str) -> list[str]:
    """n[1-3] as n1, n2, n3."""
    return call("scontrol", "show", "hostnames", nodelist).split()


def named(record: dict[str, str], key: str) -> list[str]:
    """The nodes that a job's record names under ReqNodeList or ExcNodeList."""
    value = record.get(key, "(null)")
    return [] if value == "(null)" else hosts(value)


def nodes_up(partition: str) -> set[str]:
    """Nodes of a partition that run jobs or could."""
    states = "--states=idle,alloc,mix,comp"
    return set(call("sinfo", "--noheader", "--Node", f"--partition={partition}", states, "--format=%N").split())


def requeue(number: str) -> None:
    """Put a job back into the queue under its number."""
    call("scontrol", "requeue", number)


def exclude(number: str, nodes: list[str]) -> None:
    """Keep a job that waits off these nodes and no others, for good: Slurm remembers it when the job is requeued."""
    call("scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}")


def cancel(number: str) -> None:
    """End a job for good."""
    call("scancel", number)


def warn(number: str) -> None:
    """Send a job's batch script the signal that Slurm sends before the time limit: it saves and requeues itself."""
    call("scancel", "--batch", "--signal=USR1", number)


def minutes(limit: str) -> int:
    """A time limit as Slurm spells it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in whole minutes, rounded up.

    Raises MegalmError for another spelling.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise MegalmError(f"time limit {limit} is not as Slurm spells it: write minutes, H:M:S or D-H:M:S")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minute, second = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minute, second = numbers
    else:
        hours, (minute, second) = 0, (*numbers, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + minute + bool(second)
