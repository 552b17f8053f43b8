"""The launchers that DeepSpeed and PyTorch bring, on one machine or on the machines of a hostfile."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.target import REPOSITORY, Target
from megalm.errors import MegalmError

PORT = 29500
_PATIENCE = 60.0
"""Seconds for other machines to end after a signal: torchrun gives its ranks 30 to save, then kills them."""


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """DeepSpeed's format, `NAME slots=N` a line. Raises MegalmError for a file or line that is not so."""
    if not path.is_file():
        raise MegalmError(f"there is no hostfile {path}: write one line per machine, NAME slots=N")
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None or any(host.name == match[1] for host in hosts):
            raise MegalmError(f"{path}:{number}: {text!r} is not NAME slots=N of a machine not named before")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise MegalmError(f"{path} names no machine: write one line per machine, NAME slots=N")
    return hosts


def deepspeed_command(target: Target, hostfile: Path | None, ranks: int, visible: list[str] | None = None) -> list[str]:
    """DeepSpeed's launcher; it reaches other machines by pdsh or ssh itself. visible: the GPUs of this machine that may
    be used, which its --num_gpus does not look at.

    Raises MegalmError for an illegal size, and for GPUs that its launcher cannot be told.
    """
    hosts = read_hostfile(hostfile) if hostfile else []
    _require_legal(target, sum(host.slots for host in hosts) if hosts else ranks)
    where = ["--num_gpus", str(ranks)]
    if hostfile:
        where = ["--hostfile", str(hostfile)]
    elif visible:
        if ranks > len(visible) or not all(gpu.isdecimal() for gpu in visible):
            raise MegalmError(
                f"DeepSpeed's launcher cannot put {ranks} ranks on CUDA_VISIBLE_DEVICES={','.join(visible)}: it needs "
                "a number of a GPU for each; take launch local, or correct the variable"
            )
        where = ["--include", f"localhost:{','.join(visible[:ranks])}"]
    return [str(Path(sys.executable).with_name("deepspeed")), *where, *target.arguments]


def torchrun_commands(target: Target, hostfile: Path | None, ranks: int) -> list[list[str]]:
    """torchrun on this machine, or by ssh on every machine of the hostfile, in the same folder.

    Raises MegalmError for an illegal size, and for machines with different numbers of slots.
    """
    run = [sys.executable, "-m", "torch.distributed.run"]
    if hostfile is None:
        _require_legal(target, ranks)
        return [[*run, "--standalone", "--nproc-per-node", str(ranks), *target.arguments]]
    hosts = read_hostfile(hostfile)
    if len({host.slots for host in hosts}) > 1:
        raise MegalmError(f"{hostfile} gives machines different slots: ranks are laid out over equal machines")
    _require_legal(target, sum(host.slots for host in hosts))
    commands = []
    for index, host in enumerate(hosts):
        rendezvous = ["--nnodes", str(len(hosts)), "--node-rank", str(index), "--master-addr", hosts[0].name]
        inner = [*run, *rendezvous, "--master-port", str(PORT), "--nproc-per-node", str(host.slots), *target.arguments]
        there = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(str(REPOSITORY))} exec {shlex.join(inner)}"
        commands.append(["ssh", "-tt", "-o", "BatchMode=yes", host.name, there])
    return commands


def _require_legal(target: Target, world_size: int) -> None:
    if problem := target.problem(world_size):
        raise MegalmError(problem)


def execute(commands: list[list[str]]) -> int:
    """Run one command in place of this process; several at once, until all have ended or one has failed.

    A signal to this process lets the ranks of several save; connections that are still there after that are closed.
    """
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
    if len(commands) == 1:
        os.execvpe(commands[0][0], commands[0], environment)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's and a background job's
            signal.signal(number, lambda number, _: told.append(number))
    running: list[subprocess.Popen[bytes]] = []
    deadline = float("inf")
    try:
        for command in commands:
            # In sessions of their own: a Ctrl-C typed here would end ssh and with it the ranks.
            running.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
            )
        while None in (codes := [process.poll() for process in running]):
            if told and deadline == float("inf"):
                deadline = time.monotonic() + _PATIENCE
                for process in running:
                    _interrupt(process)
            if time.monotonic() > deadline or (any(codes) and not told):
                break
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if told and any(code != 0 for code in codes):
        return 128 + told[0]  # as a shell says it
    return next(filter(None, codes), 0)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Type Ctrl-C into the terminal of a remote command."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has just ended
        process.stdin.write(b"\x03")
