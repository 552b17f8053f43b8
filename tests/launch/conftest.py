"""Supervised scripts that take milliseconds: what the launcher does has nothing to do with torch."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import job
from launch.site import Supervision
from launch.supervisor import Supervisor, agent_command, python_path
from launch.target import Target


class Nodes:
    """Several agents on this machine, each under the name of a node, as one process that starts and ends them."""

    def __init__(self, supervisor: Supervisor, names: list[str]):
        self.supervisor, self.names = supervisor, names

    def __call__(self) -> subprocess.Popen[bytes]:
        lines = [" ".join([*agent_command(name, f"127.0.0.1:{self.supervisor.port}"), "&"]) for name in self.names]
        environment = python_path(dict(os.environ)) | self.supervisor.secret
        return subprocess.Popen(["bash", "-c", "\n".join([*lines, "wait"])], env=environment)


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., int]:
    """Run a script, given as text, on two nodes of two ranks, as a start of job 7 if that is noted; keyword arguments
    change the settings."""

    def run(
        text: str, nodes: int = 2, ranks: int = 2, named: Sequence[str] = (), may_move: bool = False, **settings: Any
    ) -> int:
        script = tmp_path / "script.py"
        script.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(text))
        names = list(named) or [f"n{number}" for number in range(1, nodes + 1)]
        target = Target([str(script)], tmp_path / "run")
        supervisor = Supervisor(
            target,
            Supervision(**{"backoff": 0.1, **settings}),
            nodes=names,
            ranks_per_node=ranks,
            folder=tmp_path / "run" / "launch" / "start",
            environment={"MARK": str(tmp_path / "mark")},
            failures=job.failures(target, "7"),
            fruitless=job.fruitless(target, "7"),
            address="127.0.0.1",
            may_move=may_move,
        )
        before = signal.signal(signal.SIGUSR1, lambda number, _: supervisor.stop(number))
        try:
            return supervisor.run(Nodes(supervisor, names))
        finally:
            signal.signal(signal.SIGUSR1, before)

    return run


@pytest.fixture
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command as a user types it."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *arguments]
        environment = python_path(dict(os.environ))
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)

    return run
