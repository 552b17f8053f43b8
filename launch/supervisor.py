"""Starts ranks on the nodes of a job and watches them: one attempt after the other until the run is done.

The supervisor listens; an agent on every node joins it (launch/agent.py). It passes signals on, ends an attempt within
seconds when a rank dies, a node falls silent or nothing moves, says what came first, waits, and starts the next one
from the newest checkpoint, without nodes that failed twice. It knows nothing of Slurm: launch/job.py does.
"""

import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from launch.agent import TOKEN
from launch.site import Supervision
from launch.target import REPOSITORY, Target, newest_step
from launch.watchdog import Diagnosis, Watchdog, diagnose
from launch.wire import Message, Wire
from megalm.metrics.events import LAUNCHER, write_event

DONE, FAILED, MISTAKE, ANOMALY, PREEMPTED = 0, 1, 2, 3, 75
"""Exit codes; those of the trainer are passed on."""
_FOLLOW = 5.0
"""Seconds that the others have to say their last words after the first rank has died."""
_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "failed to recv, got 0 bytes",
    "Socket Timeout",
    "NCCL communicator was aborted",
    "Timed out waiting",
    "Watchdog caught collective operation timeout",
)
"""What ranks say that died because another one had."""


class Verdict(Enum):
    """How an attempt ended."""

    DONE = "done"
    STOPPED = "stopped"
    MISTAKE = "mistake"
    ANOMALY = "anomaly"
    FAILED = "failed"


@dataclass
class Node:
    """name: as the scheduler calls it. port: free there a moment ago. heard: when it last spoke. ranks: that run."""

    name: str
    wire: Wire
    port: int
    heard: float
    ranks: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Exit:
    """A rank that ended badly. code: None if its node was lost or the rank hung."""

    rank: int | None
    node: str
    code: int | None
    time: float
    words: str

    @property
    def how(self) -> str:
        if self.code is None:
            return self.words.splitlines()[0] if self.words else "lost"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"killed by {name}" + (" (out of memory, or somebody's kill)" if name == "SIGKILL" else "")
        return f"exit code {self.code}"


class Supervisor:
    """One job: `run` it; `stop` it from a signal handler; `turn` is one look at the wires."""

    def __init__(
        self,
        target: Target,
        settings: Supervision,
        *,
        nodes: Sequence[str],
        ranks_per_node: int,
        folder: Path,
        environment: dict[str, str],
        failures: Counter[str],
        fruitless: int = 0,
        address: str = "",
        port: int = 0,
        token: str = "",
        may_move: bool = False,
    ):
        """Args:
        nodes: that are expected to join.
        folder: for this start's files: standard errors, stacks.
        environment: for every rank, beside what its node has.
        failures: of nodes so far; counted on.
        fruitless: ends of the job's earlier starts and attempts since the newest checkpoint; counted on.
        address, port, token: where to listen and what agents must show, if that was agreed before.
        may_move: whether the scheduler can give other nodes in place of those that failed.
        """
        self._target, self._settings, self._expected = target, settings, list(nodes)
        self._slots, self._folder, self._environment = ranks_per_node, folder, environment
        self._failures, self._may_move = failures, may_move
        self._fruitless, self._step = fruitless, newest_step(target.folder)
        self._token = token or secrets.token_hex(16)
        self._listener = socket.create_server((address, port), backlog=1024)
        self._strangers: list[Wire] = []
        self._nodes: dict[str, Node] = {}
        self._signal, self._since, self._hurry = 0, 0.0, False
        self._attempt = 0
        self.wants_other_nodes = False

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def secret(self) -> dict[str, str]:
        """The variable that agents must be started with."""
        return {TOKEN: self._token}

    @property
    def excluded(self) -> list[str]:
        """Nodes that failed too often."""
        return sorted(name for name, count in self._failures.items() if count >= self._settings.exclude_after)

    def stop(self, number: int) -> None:
        """Let the ranks finish their step, save and end. May be called from a signal handler, and repeatedly; a
        Ctrl-C that is repeated after some seconds ends them at once."""
        if self._signal and number == signal.SIGINT and time.monotonic() - self._since > _FOLLOW:
            self._hurry = True
        elif not self._signal:
            self._signal, self._since = number, time.monotonic()

    def run(self, start_agents: Callable[[], subprocess.Popen[bytes]]) -> int:
        """Returns an exit code. start_agents: starts the agents of all nodes; called again if they ended."""
        agents, expected = start_agents(), set(self._expected)
        try:
            while True:
                if self._signal:
                    return self._stopped()
                if agents.poll() is not None:
                    agents, expected = start_agents(), set(self._expected)
                nodes = self._gather(agents, expected)
                expected = set(self._nodes)  # those that leave while the agents run do not come back
                if self._signal:
                    return self._stopped()
                verdict, first = self._run_once(nodes) if nodes else (Verdict.FAILED, self._nobody())
                if verdict is Verdict.DONE:
                    self._note("done", step=newest_step(self._target.folder))
                    self._say("done")
                    return DONE
                if verdict is Verdict.STOPPED:
                    return self._stopped()
                if verdict in (Verdict.MISTAKE, Verdict.ANOMALY):
                    return MISTAKE if verdict is Verdict.MISTAKE else ANOMALY
                if first and first.node:
                    self._failures[first.node] += 1
                if self._gives_up() or not self._can_go_on():
                    return FAILED
                self._wait()
        finally:
            for node in self._nodes.values():
                node.wire.send(quit=True)
                node.wire.close()
            self._listener.close()
            # Who sends SIGTERM kills soon: what is left of that time is needed to requeue.
            _end(agents, patience=1.0 if self._signal == signal.SIGTERM else 10.0)

    def drain(self) -> None:
        """Stop, and return when no rank runs any more. For a signal handler that does not return to run()."""
        self.stop(signal.SIGUSR1)
        self._pass_on()
        while any(node.ranks for node in self._nodes.values()):
            self.turn()

    def turn(self, timeout: float = 0.1) -> list[tuple[Node, Message]]:
        """What agents said meanwhile. Joins newcomers; drops nodes that hung up or fell silent."""
        wires = {node.wire: node for node in self._nodes.values()}
        watched: list[Any] = [self._listener, *self._strangers, *wires]
        said: list[tuple[Node, Message]] = []
        ready, *_ = select.select(watched, [], [], timeout)
        now = time.monotonic()
        for each in ready:
            if each is self._listener:
                connection, _ = self._listener.accept()
                self._strangers.append(Wire(connection))
                continue
            messages = each.receive()
            if each in wires:
                node = wires[each]
                node.heard = now
                if messages is None:
                    self._lose(node)
                    said.append((node, {"lost": "its agent is gone"}))
                for message in messages or []:
                    self._track(node, message)
                    said.append((node, message))
            else:
                self._admit(each, messages)
        for node in list(self._nodes.values()):
            if now - node.heard > self._settings.silent_after:
                self._lose(node)
                said.append((node, {"lost": f"nothing was heard of it for {self._settings.silent_after:.0f} s"}))
        return said

    def _admit(self, wire: Wire, messages: list[Message] | None) -> None:
        if messages == []:
            return
        self._strangers.remove(wire)
        match messages:
            case [{"hello": str(name), "port": int(port), "token": str(token)}, *_] if self._knows(token):
                self._nodes[name] = Node(name, wire, port, time.monotonic())
            case _:  # anybody can reach the port: a scanner, an agent of another job
                wire.close()

    def _knows(self, token: str) -> bool:
        # As bytes: of texts, only ASCII ones can be compared.
        return secrets.compare_digest(token.encode(errors="replace"), self._token.encode())

    def _track(self, node: Node, message: Message) -> None:
        if "exit" in message:
            node.ranks.discard(message["exit"])
        if "idle" in message:
            node.port = message["port"]
        if "signal" in message:
            self.stop(message["signal"])

    def _lose(self, node: Node) -> None:
        node.wire.close()
        node.ranks.clear()
        if self._nodes.get(node.name) is node:
            del self._nodes[node.name]

    def _gather(self, agents: subprocess.Popen[bytes], expected: set[str]) -> list[Node]:
        """The nodes of the next attempt, once all that are `expected` have joined or had time to: those that are not
        excluded, as many as the config can use."""
        deadline = time.monotonic() + self._settings.join_within
        while time.monotonic() < deadline and agents.poll() is None and not self._signal:
            if expected <= self._nodes.keys():
                break
            self.turn()
        # A signal cuts the waiting short: nobody is late then.
        missing = [name for name in self._expected if name not in self._nodes and not self._signal]
        for name in missing:
            self._say(f"{name} has not joined")
        here = [self._nodes[name] for name in self._expected if name in self._nodes]
        return self._usable(here)

    def _usable(self, here: list[Node]) -> list[Node]:
        chosen = self._largest([node for node in here if node.name not in self.excluded])
        if not chosen and not self._may_move:  # a node that fails is better than none
            chosen = self._largest(here)
        if 0 < len(chosen) < len(self._expected):
            self._say(f"going on with {len(chosen)} of {len(self._expected)} nodes")
        return chosen

    def _largest(self, nodes: list[Node]) -> list[Node]:
        for count in range(len(nodes), 0, -1):
            if count == len(self._expected) or self._target.problem(count * self._slots) is None:
                return nodes[:count] if self._target.config is not None else nodes
        return []

    def _gives_up(self) -> bool:
        """Count one more end without a new checkpoint; whether these were too many in a row."""
        now = newest_step(self._target.folder)
        self._fruitless, self._step = (self._fruitless + 1 if now == self._step else 1), now
        if self._fruitless <= self._settings.restarts:
            return False
        self._note("gave up", restarts=self._fruitless - 1)
        self._say(
            f"giving up: {self._fruitless} failures or time limits without a new checkpoint in between "
            f"(supervise.restarts={self._settings.restarts}); started again, the run continues"
        )
        return True

    def _can_go_on(self) -> bool:
        """Whether the next attempt has nodes; otherwise the scheduler is to give others."""
        here = [node for node in self._nodes.values() if node.name not in self.excluded]
        lost = len(self._nodes) < len(self._expected)
        if self._largest(here) or not self._may_move or (lost and not self.excluded):
            return True
        self.wants_other_nodes = True
        self._note("moving", excluded=self.excluded, step=self._step, failures=self._fruitless)
        self._say(f"asking for other nodes: {', '.join(self.excluded)} failed {self._settings.exclude_after} times")
        return False

    def _nobody(self) -> Exit:
        names = [name for name in self._expected if name not in self._nodes]
        first = Exit(None, names[0] if names else "", None, time.time(), f"{', '.join(names)} did not join")
        self._note("failed", node=first.node, how=first.how)
        return first

    def _run_once(self, nodes: list[Node]) -> tuple[Verdict, Exit | None]:
        """One attempt, from the start of the ranks until none runs."""
        self._attempt += 1
        size, master = len(nodes) * self._slots, nodes[0]
        local = master.wire.address.startswith(("127.", "::1"))
        environment = self._environment | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(self._slots),
            "MASTER_ADDR": master.name if local and len(nodes) > 1 else master.wire.address.removeprefix("::ffff:"),
            "MASTER_PORT": str(master.port),
        }
        home: dict[int, str] = {}
        errors = self._folder / f"attempt-{self._attempt}"
        started = time.time()
        self._note(
            "started",
            attempt=self._attempt,
            nodes=[n.name for n in nodes],
            ranks=size,
            step=newest_step(self._target.folder),
        )
        for index, node in enumerate(nodes):
            first = index * self._slots
            node.ranks = set(range(first, first + self._slots))
            home |= dict.fromkeys(node.ranks, node.name)
            node.wire.send(
                start={
                    "command": self._target.command,
                    "environment": environment | {"NODE_RANK": str(index)},
                    "first": first,
                    "count": self._slots,
                    "folder": str(errors.resolve()),
                    "attempt": self._attempt,
                }
            )
        watchdog = Watchdog(self._settings.start_within, self._settings.hang_after)
        exits: list[Exit] = []
        codes: dict[int, int] = {}
        # deadline: when those that are left are killed, once something went wrong.
        passed_on, deadline, stepped, killed = False, float("inf"), False, False
        while any(node.ranks for node in nodes):
            if self._signal and not passed_on:
                passed_on = True
                self._say(f"{signal.Signals(self._signal).name} received: the ranks finish their step, save and end")
                self._pass_on()
            for node, message in self.turn():
                if "alive" in message:
                    for rank, note in message["alive"].items():
                        watchdog.saw(int(rank), note)
                elif "exit" in message:
                    rank, code = message["exit"], message["code"]
                    codes[rank] = code
                    watchdog.gone(rank)
                    if code not in (DONE, PREEMPTED):
                        exits.append(Exit(rank, node.name, code, message["time"], message["words"]))
                        deadline = min(deadline, time.monotonic() + _FOLLOW)
                elif "lost" in message and node in nodes:
                    exits.append(Exit(None, node.name, None, time.time(), f"{node.name} is lost, {message['lost']}"))
                    deadline = min(deadline, time.monotonic() + _FOLLOW)
            if watchdog.has_stepped and not stepped:
                stepped = True
                self._note("stepping", step=watchdog.step, seconds=round(time.time() - started, 1))
            if watchdog.hangs and deadline == float("inf"):
                exits.append(self._hang(watchdog, home, errors))
                deadline = time.monotonic()
            if not killed and (time.monotonic() > deadline or self._hurry):
                killed = True
                for node in self._nodes.values():
                    node.wire.send(kill=True)
        return self._judge(exits, codes, size, errors, watchdog)

    def _judge(
        self, exits: list[Exit], codes: dict[int, int], size: int, errors: Path, watchdog: Watchdog
    ) -> tuple[Verdict, Exit | None]:
        if self._target.is_done or (len(codes) == size and not any(codes.values())):
            shutil.rmtree(errors, ignore_errors=True)
            return Verdict.DONE, None
        stopping = (-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT, PREEMPTED)
        first = _first(exits)
        if self._signal and (first is None or first.code in stopping or first.code not in (MISTAKE, ANOMALY)):
            return Verdict.STOPPED, first
        if first is None:  # every rank says 75, and nobody here asked for it
            self.stop(signal.SIGTERM)
            return Verdict.STOPPED, None
        who = f"rank {first.rank} on {first.node}" if first.rank is not None else first.node
        others = len([each for each in exits if each is not first])
        step = max(watchdog.step, newest_step(self._target.folder))
        kind = {MISTAKE: Verdict.MISTAKE, ANOMALY: Verdict.ANOMALY}.get(first.code or 0, Verdict.FAILED)
        last = first.words.splitlines()[-1] if first.words else ""
        self._note(
            "failed", attempt=self._attempt, rank=first.rank, node=first.node, how=first.how, words=last, step=step
        )
        followed = f"; {others} more followed" if others else ""
        print(f"launch: {who} ended first ({first.how}), after step {step}{followed}", flush=True)
        for line in first.words.splitlines():
            print(f"    {line}", flush=True)
        if errors.exists() and any(errors.iterdir()):
            self._say(f"what all ranks said is in {errors}")
        return kind, first

    def _hang(self, watchdog: Watchdog, home: dict[int, str], errors: Path) -> Exit:
        """Say where everybody is."""
        stacks = self._stacks()
        errors.mkdir(parents=True, exist_ok=True)
        path = errors / "stacks.txt"
        path.write_text("".join(f"==== rank {rank} ({home[rank]})\n{stacks[rank]}\n" for rank in sorted(stacks)))
        found: Diagnosis = diagnose(watchdog.places, stacks, home)
        limit = watchdog.limit
        self._say(f"no rank has got anywhere for {limit:.0f} s; where they are:")
        for line in found.lines:
            print(f"    {line}", flush=True)
        self._say(f"their Python stacks are in {path}")
        self._note("hung", seconds=limit, places=found.lines, rank=found.culprit, stacks=str(path))
        culprit = found.culprit
        words = f"hung for {limit:.0f} s\n{found.lines[0]}"
        return Exit(culprit, home[culprit] if culprit is not None else "", None, time.time(), words)

    def _stacks(self) -> dict[int, str]:
        asked = [node for node in self._nodes.values() if node.ranks]
        for node in asked:
            node.wire.send(stacks=True)
        told: dict[int, str] = {}
        waiting, deadline = {node.name for node in asked}, time.monotonic() + 15
        while waiting and time.monotonic() < deadline:
            for node, message in self.turn():
                if "told_stacks" in message:
                    waiting.discard(node.name)
                    told |= {int(rank): text for rank, text in message["told_stacks"].items()}
        return told

    def _pass_on(self) -> None:
        for node in self._nodes.values():
            node.wire.send(signal=int(signal.SIGTERM))

    def note_stop(self, number: int) -> None:
        """Write down that a signal ended the attempt."""
        name, step = signal.Signals(number).name, newest_step(self._target.folder)
        self._note("stopped", signal=name, step=step, failures=self._fruitless if step == self._step else 0)
        self._say(f"stopped by {name} at step {step}")

    def _stopped(self) -> int:
        # A time limit that is over before a checkpoint is written would be over again.
        if self._signal == signal.SIGUSR1 and newest_step(self._target.folder) == self._step and self._gives_up():
            return FAILED
        self.note_stop(self._signal)
        return PREEMPTED

    def _wait(self) -> None:
        pause = min(self._settings.backoff * 2 ** (self._fruitless - 1), 300.0)
        self._note("restarting", seconds=pause, step=self._step, failures=self._fruitless)
        self._say(
            f"restarting in {pause:.0f} s from step {self._step} (failure {self._fruitless} without a new checkpoint, "
            f"{self._settings.restarts} restarts are allowed)"
        )
        end = time.monotonic() + pause
        while time.monotonic() < end and not self._signal:
            self.turn()

    def _note(self, event: str, **facts: Any) -> None:
        write_event(self._target.folder / LAUNCHER, event, **facts)

    def _say(self, message: str) -> None:
        print(f"launch: {message}", flush=True)


def _first(exits: list[Exit]) -> Exit | None:
    """The one that the others followed: the earliest that does not speak of another's end."""

    def key(each: Exit) -> tuple[bool, bool, float]:
        consequence = any(words in each.words for words in _CONSEQUENCES)
        echo = each.code in (MISTAKE, ANOMALY) and not each.words  # another rank says why
        return consequence, echo, each.time

    return min(exits, key=key, default=None)


def _end(agents: subprocess.Popen[bytes], patience: float) -> None:
    try:
        agents.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        agents.kill()
        agents.wait()


def agent_command(name: str, address: str) -> list[str]:
    """The command that starts a node's agent. name: of the node; $NAME is taken from the environment there."""
    return [sys.executable, "-m", "launch", "agent", "--join", address, "--name", name]


def python_path(environment: dict[str, str]) -> dict[str, str]:
    """`environment` with this repository on Python's path, so that agents and scripts find it from any folder."""
    parts = [str(REPOSITORY), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    return environment | {"PYTHONPATH": ":".join(dict.fromkeys(parts))}
