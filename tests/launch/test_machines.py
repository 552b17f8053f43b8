"""torchrun by ssh: what a signal to the launcher means over there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.supervisor import python_path

SSH = f"""#!{sys.executable}
import os, pty, sys
open("ssh-" + sys.argv[1], "w").write(str(os.getpid()))
sys.exit(os.waitstatus_to_exitcode(pty.spawn(["sh", "-c", sys.argv[2]])))
"""
"""As ssh -tt: what is typed here goes to a terminal over there, which hangs up when this end dies."""

LAUNCHER = """
import signal
for number in (signal.SIGHUP, signal.SIGINT):  # these tests may run under nohup, or behind a shell's &
    signal.signal(number, signal.SIG_DFL)
from launch import machines
from megalm.errors import main_guard
machines._PATIENCE = {patience}
main_guard(lambda: machines.execute([["./ssh", host, "exec {python} rank.py " + host] for host in ("a", "b")]))
"""

RANK = """
import signal, sys, time
host = sys.argv[1]

def save(number, frame):
    time.sleep(1)
    open("saved-" + host, "w").close()
    sys.exit(75)

signal.signal(signal.SIGINT, {handler})
open("ready-" + host, "w").close()
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """The launcher of two machines, once both run."""
    started: list[subprocess.Popen[bytes]] = []

    def run(handler: str, patience: float) -> subprocess.Popen[bytes]:
        (tmp_path / "rank.py").write_text(RANK.format(handler=handler))
        (tmp_path / "ssh").write_text(SSH)
        (tmp_path / "ssh").chmod(0o755)
        code = LAUNCHER.format(patience=patience, python=sys.executable)
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=python_path(dict(os.environ))))
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready-{host}").exists() for host in "ab"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return started[0]

    yield run
    started[0].kill()
    for path in tmp_path.glob("ssh-*"):
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def connections(folder: Path) -> int:
    return sum(Path("/proc", path.read_text()).exists() for path in folder.glob("ssh-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_ranks_of_all_machines_save(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, number: signal.Signals
) -> None:
    launcher = start("save", patience=60)
    assert connections(tmp_path) == 2
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 128 + number
    assert (tmp_path / "saved-a").exists() and (tmp_path / "saved-b").exists()
    assert connections(tmp_path) == 0


def test_a_machine_that_does_not_end_is_hung_up_on(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    launcher = start("signal.SIG_IGN", patience=1)
    launcher.terminate()
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    assert connections(tmp_path) == 0
