"""What runs on every node: starts ranks when the supervisor says so, tells how they are and how they ended.

A rank's standard error goes to a file of its own, so that the log is not eight hundred times the same traceback; rank
0's is copied to the log as it comes, but for the traceback it may die with: which rank died first, and of what, is the
supervisor's to say. Ranks never outlive their agent, and an agent never outlives its supervisor.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launch.wire import Message, Wire
from megalm.errors import MegalmError

TOKEN = "MEGALM_LAUNCH_TOKEN"
"""Environment variable with the secret that an agent shows to its supervisor."""
WHEREABOUTS = "MEGALM_WHEREABOUTS"
"""Environment variable with the file in which a rank notes what it is doing (megalm/training/whereabouts.py)."""
HEARTBEAT = 1.0
_TURN = 0.05
_TRACEBACK = b"Traceback (most recent call last)"
_HOLD = 30.0
"""Seconds after which a traceback that rank 0 wrote and survived is shown."""
_WORDS = 60
"""Lines of a rank's standard error that are told when it has died."""


def serve(address: str, node: str) -> int:
    """Join the supervisor at HOST:PORT as `node` and do what it says until it hangs up."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise MegalmError(f"--join {address} is not HOST:PORT: the supervisor starts agents itself (launch submit)")
    wire = _join(host, int(port))
    wire.send(hello=node, token=os.environ.get(TOKEN, ""), port=free_port())
    return Agent(wire).run()


def _join(host: str, port: int, patience: float = 120.0) -> Wire:
    deadline = time.monotonic() + patience
    while True:
        try:
            return Wire(socket.create_connection((host, port), timeout=10))
        except OSError as error:
            if time.monotonic() > deadline:
                raise MegalmError(
                    f"{socket.gethostname()} cannot reach the supervisor at {host}:{port} ({error}): let nodes of a "
                    "job open TCP connections to each other"
                ) from None
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    errors: Path
    whereabouts: Path

    @property
    def stacks(self) -> Path:
        """Where the rank writes its Python stacks on SIGUSR2; it is there once the rank listens."""
        return self.whereabouts.with_name(self.whereabouts.name + ".stacks")


class Agent:
    """The ranks of one node."""

    def __init__(self, wire: Wire):
        self._wire = wire
        self._ranks: list[Rank] = []
        self._running: dict[int, Rank] = {}
        self._local = Path(tempfile.mkdtemp(prefix="megalm-"))
        self._first: IO[bytes] | None = None
        self._held, self._held_since = b"", 0.0
        self._stacks_due = 0.0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._wire.send(signal=number))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        beaten = 0.0
        try:
            while True:
                if select.select([self._wire], [], [], _TURN)[0]:
                    messages = self._wire.receive()
                    if messages is None:
                        return 1
                    for message in messages:
                        if "quit" in message:
                            return 0
                        self._obey(message)
                self._look()
                if time.monotonic() - beaten > HEARTBEAT:
                    beaten = time.monotonic()
                    self._wire.send(alive={rank.number: _read(rank.whereabouts) for rank in self._running.values()})
        finally:
            self._kill()
            shutil.rmtree(self._local, ignore_errors=True)

    def _obey(self, message: Message) -> None:
        if "start" in message:
            self._start(**message["start"])
        elif "signal" in message:
            for rank in self._running.values():
                rank.process.send_signal(message["signal"])
        elif "kill" in message:
            self._kill()
        elif "stacks" in message:
            for rank in self._running.values():
                if rank.stacks.exists():
                    rank.process.send_signal(signal.SIGUSR2)
            self._stacks_due = time.monotonic() + 1.0

    def _start(
        self, command: list[str], environment: dict[str, str], first: int, count: int, folder: str, attempt: int
    ) -> None:
        errors = Path(folder)
        errors.mkdir(parents=True, exist_ok=True)
        self._ranks = []
        for local in range(count):
            number = first + local
            whereabouts = self._local / f"{attempt}-rank-{number}"
            path = errors / f"rank-{number:05}.err"
            with path.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    env=os.environ
                    | environment
                    | {"RANK": str(number), "LOCAL_RANK": str(local), WHEREABOUTS: str(whereabouts)},
                    stdin=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,
                    preexec_fn=_of_its_parent,
                )
            self._ranks.append(Rank(number, process, path, whereabouts))
        self._running = {rank.number: rank for rank in self._ranks}
        self._first, self._held = (self._ranks[0].errors.open("rb") if first == 0 else None), b""

    def _look(self) -> None:
        """Copy what rank 0 said, tell of ranks that ended and of stacks that were asked for."""
        for rank in [rank for rank in self._running.values() if rank.process.poll() is not None]:
            if rank.number == 0:
                self._copy(ended=rank.process.returncode)
            del self._running[rank.number]
            _kill_group(rank)  # what it may have left behind
            words = _words(rank.errors)
            if not words:
                rank.errors.unlink(missing_ok=True)
            # The last thing to do with its files: the supervisor may now remove them.
            self._wire.send(exit=rank.number, code=rank.process.returncode, time=time.time(), words=words)
            if not self._running:
                self._wire.send(idle=True, port=free_port())
        self._copy()
        if self._stacks_due and time.monotonic() > self._stacks_due:
            self._stacks_due = 0.0
            told = {r.number: r.stacks.read_text(errors="replace") for r in self._running.values() if r.stacks.exists()}
            self._wire.send(told_stacks=told)

    def _copy(self, ended: int | None = None) -> None:
        """Show what rank 0 has said since; from a traceback on, only if it survives that."""
        if self._first is None:
            return
        said = self._held + self._first.read()
        shown, traceback, rest = said.partition(_TRACEBACK)
        if traceback:  # with what stands before it on its line
            shown, line = shown[: shown.rfind(b"\n") + 1], shown[shown.rfind(b"\n") + 1 :]
            traceback = line + traceback
        if not self._held:
            self._held_since = time.monotonic()
        if ended == 0 or (ended is None and time.monotonic() - self._held_since > _HOLD):
            shown, traceback, rest = said, b"", b""
        if ended is not None:
            self._first.close()
            self._first = None
        self._held = traceback + rest
        if shown:
            sys.stderr.buffer.write(shown)
            sys.stderr.buffer.flush()

    def _kill(self) -> None:
        for rank in self._running.values():
            _kill_group(rank)
        for rank in self._running.values():
            rank.process.wait()


def _of_its_parent() -> None:
    """In a rank before it starts: die when the agent dies, and let a request for stacks that comes too early pass."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _kill_group(rank: Rank) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, signal.SIGKILL)


def _read(path: Path) -> Any:
    """A rank's note, None while there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _words(path: Path) -> str:
    """The last thing a rank said: its traceback if there is one, else its last lines."""
    lines = path.read_text(errors="replace").rstrip().splitlines() if path.exists() else []
    tracebacks = [n for n, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(lines[tracebacks[-1] if tracebacks else 0 :][-_WORDS:])
