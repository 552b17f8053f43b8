"""Ranks that die, hang, are told to stop, and come back; with scripts that take no time."""

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch import job
from launch.job import fruitless
from launch.site import Site, Supervision
from launch.supervisor import Supervisor
from launch.target import Target
from launch.watchdog import diagnose, waiting
from launch.wire import _LONGEST, Wire
from megalm.metrics.events import LAUNCHER, read_events, write_event

Supervise = Callable[..., int]
ONCE = """
try:
    os.close(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
    first = True
except FileExistsError:
    first = False
"""


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(tmp_path / "run") if event["event"] == kind]


def test_ranks_get_their_place(supervise: Supervise, tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")
    text = f"open(os.environ['MARK'] + str(rank), 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert supervise(text) == 0
    found = [(tmp_path / f"mark{rank}").read_text() for rank in range(4)]
    assert found == ["0 0 4 2 0", "1 1 4 2 0", "2 0 4 2 1", "3 1 4 2 1"]
    assert len(events(tmp_path, "done")) == 1


def test_the_first_error_is_on_top_and_the_run_restarts(
    supervise: Supervise, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 dies; the others say what ranks say whose peer has died, some of them before it is known."""
    text = """
    mark = os.environ["MARK"]
    if not os.path.exists(mark + "second"):
        open(mark + "ready" + str(rank), "w").close()
        while not all(os.path.exists(mark + "ready" + str(other)) for other in range(4)):
            time.sleep(0.01)
        if rank == 2:
            open(mark + "second", "w").close()
            raise ValueError("the true reason")
        while not os.path.exists(mark + "second"):
            time.sleep(0.01)
        raise RuntimeError("Connection closed by peer")
    """
    started = time.monotonic()
    assert supervise(text) == 0
    assert time.monotonic() - started < 30
    (failed,) = events(tmp_path, "failed")
    assert (failed["rank"], failed["node"], failed["words"]) == (2, "n2", "ValueError: the true reason")
    assert [event["event"] for event in read_events(tmp_path / "run")] == [
        *("started", "failed", "restarting", "started", "done")
    ]
    said, errors_said = capfd.readouterr()
    assert "Connection closed" not in errors_said, "rank 0's own traceback is not on top of the reason"
    assert said.index("rank 2 on n2 ended first (exit code 1)") < said.index("ValueError: the true reason")
    assert "3 more followed" in said and "Connection closed" not in said
    errors = tmp_path / "run" / "launch" / "start" / "attempt-1"
    assert len(list(errors.glob("rank-*.err"))) == 4


def test_a_rank_that_is_killed_ends_those_that_wait_for_it(supervise: Supervise, tmp_path: Path) -> None:
    text = ONCE + "if first: os.kill(os.getpid(), 9)\nif not os.path.exists(os.environ['MARK'] + 'x'): time.sleep(1)"
    hanging = text + "\nif rank != 0 and not os.environ.get('never'): time.sleep(0)"
    assert supervise(hanging) == 0
    (failed,) = events(tmp_path, "failed")
    assert failed["how"].startswith("killed by SIGKILL")


def test_ranks_that_would_wait_for_good_are_ended_within_seconds(supervise: Supervise, tmp_path: Path) -> None:
    started = time.monotonic()
    assert supervise("if rank == 1: sys.exit(7)\ntime.sleep(600)", restarts=0) == 1
    assert time.monotonic() - started < 30
    assert len(events(tmp_path, "gave up")) == 1


def test_a_mistake_is_not_repeated(supervise: Supervise, tmp_path: Path) -> None:
    assert supervise("if rank == 0: print('error: a mistake', file=sys.stderr)\nsys.exit(2)") == 2
    (failed,) = events(tmp_path, "failed")
    assert (failed["rank"], failed["words"]) == (0, "error: a mistake")
    assert not events(tmp_path, "restarting")


def test_restarts_run_out(supervise: Supervise, tmp_path: Path) -> None:
    assert supervise("sys.exit(1)", restarts=2) == 1
    assert [event["seconds"] for event in events(tmp_path, "restarting")] == [0.1, 0.2]
    assert len(events(tmp_path, "started")) == 3


def test_restarts_are_not_given_anew_to_other_nodes(supervise: Supervise, tmp_path: Path) -> None:
    """What is wrong on every node is tried on some of them, not on all of the cluster."""
    for start, node in enumerate(["n1", "n2"]):
        write_event(tmp_path / "run" / LAUNCHER, "job", job="7", start=start)
        assert supervise("sys.exit(1)", named=[node], ranks=1, may_move=True, restarts=3, exclude_after=2) == 1
    kinds = [event["event"] for event in read_events(tmp_path / "run")]
    ends = [kind for kind in kinds if kind not in ("started", "failed")]
    assert ends == ["job", "restarting", "moving", "job", "restarting", "gave up"]


def test_a_time_limit_shorter_than_loading_ends_the_job(supervise: Supervise, tmp_path: Path) -> None:
    """The first start has saved something when the warning comes, the others have not."""
    text = f"""
checkpoints = {str(tmp_path / "run" / "checkpoints")!r}
if first:
    os.makedirs(checkpoints + "/step-5")
    open(checkpoints + "/step-5/manifest.json", "w").close()
    open(checkpoints + "/latest", "w").write("step-5")
os.kill({os.getpid()}, signal.SIGUSR1)
time.sleep(600)
"""
    codes = []
    for start in range(3):
        write_event(tmp_path / "run" / LAUNCHER, "job", job="7", start=start)
        codes.append(supervise(ONCE + text, nodes=1, ranks=1, restarts=1))
    assert codes == [75, 75, 1]
    assert [(event["step"], event["failures"]) for event in events(tmp_path, "stopped")] == [(5, 0), (5, 1)]
    assert len(events(tmp_path, "gave up")) == 1


def test_ends_are_counted_for_a_job_until_it_saves_or_gives_up(tmp_path: Path) -> None:
    def note(event: str, **facts: Any) -> int:
        write_event(tmp_path / LAUNCHER, event, **facts)
        return fruitless(Target([], tmp_path), "7")

    note("job", job="6", start=0)
    assert note("restarting", step=0, failures=1) == 0, "of another job"
    note("job", job="7", start=0)
    assert note("moving", step=0, failures=2) == 2
    assert note("job", job="7", start=1) == 2
    assert note("gave up", restarts=3) == 0
    assert note("restarting", step=0, failures=1) == 1
    (tmp_path / "checkpoints" / "step-5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-5" / "manifest.json").touch()
    (tmp_path / "checkpoints" / "latest").write_text("step-5")
    assert fruitless(Target([], tmp_path), "7") == 0


def test_a_signal_reaches_all_ranks_and_ends_the_job(supervise: Supervise, tmp_path: Path) -> None:
    text = """
    def stop(number, frame):
        open(os.environ["MARK"] + str(rank), "w").close()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    open(os.environ["MARK"] + "ready" + str(rank), "w").close()
    time.sleep(600)
    """

    def warn() -> None:
        while len(list(tmp_path.glob("markready*"))) < 4:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=warn, daemon=True).start()
    assert supervise(text) == 75
    assert all((tmp_path / f"mark{rank}").exists() for rank in range(4))
    assert [event["signal"] for event in events(tmp_path, "stopped")] == ["SIGUSR1"]


def test_a_node_that_failed_twice_is_excluded(supervise: Supervise, tmp_path: Path) -> None:
    usable: list[list[str]] = []
    right = Supervisor._usable

    def spy(self: Supervisor, here: Any) -> Any:
        chosen = right(self, here)
        usable.append([node.name for node in chosen])
        return chosen

    Supervisor._usable = spy  # type: ignore[method-assign]
    try:
        text = "if os.environ['NODE_RANK'] == '1' or os.environ['WORLD_SIZE'] == '4': sys.exit(1)"
        assert supervise(text, nodes=3, restarts=2) == 1
    finally:
        Supervisor._usable = right  # type: ignore[method-assign]
    assert usable == [["n1", "n2", "n3"], ["n1", "n2", "n3"], ["n1", "n3"]]


def test_a_hang_is_told_in_plain_words(supervise: Supervise, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 3 sits in data loading, the others in a communication; started again, all go through."""
    text = (
        ONCE.replace('["MARK"]', '["MARK"] + str(rank)')
        + """
from megalm.training.whereabouts import Whereabouts
where = Whereabouts.of_environment()
where.note("importing libraries")
where.step = 0
where.note("data loading")
time.sleep(1.5)
where.step = 1
where.note("data loading")
if first:
    where.note("data loading" if rank == 3 else "pipeline receive of micro-batch 2 from rank 3")
    time.sleep(600)
"""
    )
    assert supervise(text, hang_after=2.0, start_within=20.0) == 0
    (hung,) = events(tmp_path, "hung")
    assert hung["rank"] == 3
    assert hung["places"][0].startswith("rank 3 (n2) is in data loading, step 2, since ")
    assert hung["places"][1].startswith("rank 0 (n1) waits in pipeline receive of micro-batch 2 from rank 3")
    stacks = Path(hung["stacks"]).read_text()
    assert stacks.count("==== rank") == 4 and "script.py" in stacks
    assert "rank 3 on n2 ended first (hung for 2 s)" in capfd.readouterr().out
    (failed,) = events(tmp_path, "failed")
    assert (failed["rank"], failed["node"]) == (3, "n2")


STACK = """Thread 0x00007f (most recent call first):
  File "/lib/python3.11/threading.py", line 324 in wait

Current thread 0x00007f (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2501 in all_reduce
  File "/megalm/parallel/engine.py", line 180 in _weigh
"""


def test_a_stack_tells_who_waits() -> None:
    assert waiting(STACK) == "all_reduce"
    assert waiting(STACK.replace("torch/distributed", "numpy")) is None
    note = {"n": 4, "step": 6, "since": time.time() - 30, "at": "forward pass of micro-batch 1"}
    places = {0: note, 1: note | {"since": time.time() - 31}, 2: note | {"step": 5}}
    found = diagnose(places, {0: STACK, 1: STACK}, {0: "n1", 1: "n1", 2: "n2"})
    assert found.culprit == 2
    assert found.lines[0] == "rank 2 (n2) is in forward pass of micro-batch 1, step 6, since 30 s"
    assert found.lines[1].startswith("rank 0 (n1) waits in forward pass of micro-batch 1 (all_reduce), step 7")
    assert diagnose({0: note}, {0: STACK}, {}).culprit is None


ON_A_GPU = """Current thread 0x00007f (most recent call first):
  File "/site-packages/megalm/parallel/groups.py", line 109 in maximum
  File "/site-packages/megalm/parallel/engine.py", line 493 in agree
"""


def test_over_gpus_nobody_is_blamed_where_all_wait_for_a_number() -> None:
    """NCCL's collectives return at once, so that their frames are in no stack."""
    note = {"n": 4, "step": 6, "since": time.time() - 30, "at": "update of the weights"}
    places = {rank: note | {"since": note["since"] - rank} for rank in range(4)}
    nodes = dict.fromkeys(places, "n1")
    assert diagnose(places, dict.fromkeys(places, ON_A_GPU), nodes).culprit is None
    loading = ON_A_GPU.replace("parallel/groups", "data/loader").replace("parallel/engine", "training/loop")
    assert diagnose(places, {0: ON_A_GPU, 1: ON_A_GPU, 2: loading, 3: ON_A_GPU}, nodes).culprit == 2
    for frame, function in (
        ('"/site-packages/torch/cuda/streams.py", line 227 in synchronize', "synchronize"),
        ('"/repo/megalm/parallel/device.py", line 96 in number', "number"),
        ('"/repo/megalm/parallel/device.py", line 83 in send', None),
        ('"/repo/megalm/parallel/engine.py", line 153 in <lambda>', "<lambda>"),
        ('"/repo/megalm/parallel/engine.py", line 340 in _train', None),
    ):
        assert waiting(f"Current thread 0x7f (most recent call first):\n  File {frame}\n") == function


def test_the_watchdog_of_nccl_is_not_the_reason(supervise: Supervise, capfd: pytest.CaptureFixture[str]) -> None:
    """It ends ranks that waited, before the one that they waited for may have ended."""
    text = """
    if rank == 1:
        sys.exit("RuntimeError: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)")
    time.sleep(1)
    if rank == 2:
        raise ValueError("the true reason")
    time.sleep(60)
    """
    assert supervise(text, restarts=0) == 1
    assert "rank 2 on n2 ended first" in capfd.readouterr().out


def test_ranks_have_what_their_own_node_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the first node has, nor the host of a container: a batch script's environment reaches agents by srun."""
    seen: list[dict[str, str]] = []

    def supervisor(*arguments: Any, environment: dict[str, str], **options: Any) -> None:
        seen.append(environment)
        raise KeyboardInterrupt

    script = tmp_path / "script.py"
    script.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "Supervisor", supervisor)
    monkeypatch.setattr(job.sites, "of_environment", lambda: Site(environment={"NCCL_DEBUG": "WARN"}))
    monkeypatch.setattr(job.slurm, "hosts", lambda names: ["n1"])
    monkeypatch.setattr(job.slurm, "call", lambda *arguments: "")
    monkeypatch.setattr(job.slurm, "job", lambda number: {})
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "RANKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt):
        job.in_slurm([str(script)])
    with pytest.raises(KeyboardInterrupt):
        job.here(Target([str(script)], tmp_path / "run"), Site(environment={"NCCL_DEBUG": "INFO"}), 1)
    assert seen == [{"NCCL_DEBUG": "WARN"}, {"NCCL_DEBUG": "INFO"}]
    assert "--cpu-bind=none" in job.srun(Site(), 2)


def test_an_agents_environment_is_its_ranks(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_NODE", "here")
    assert supervise("open(os.environ['MARK'] + str(rank), 'w').write(os.environ['OF_THE_NODE'])") == 0
    assert (tmp_path / "mark3").read_text() == "here"


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"1\n",
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        '{"token":"é"}\n'.encode(),
        b'{"token":"\\ud800","hello":"n1","port":1}\n',
        b'{"token":"TOKEN","hello":["n1"]}\n',
        b"x" * (_LONGEST + 1),
    ],
    ids=["HTTP", "number", "brackets", "bytes", "accent", "surrogate", "malformed hello", "endless line"],
)
def test_a_stranger_does_not_end_the_job(tmp_path: Path, said: bytes) -> None:
    """What is no agent's hello closes its connection, and nothing else: an agent that comes later is admitted."""
    supervisor = Supervisor(
        Target([], tmp_path),
        Supervision(),
        nodes=["n1"],
        ranks_per_node=1,
        folder=tmp_path,
        environment={},
        failures=Counter(),
        address="127.0.0.1",
        token="TOKEN",
    )

    def turn_until(reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < deadline
            supervisor.turn()

    def send() -> None:
        with suppress(OSError):  # the supervisor hangs up before the end of what is too long
            stranger.sendall(said)

    with socket.create_connection(("127.0.0.1", supervisor.port)) as stranger:
        sender = threading.Thread(target=send)
        sender.start()
        turn_until(lambda: supervisor._strangers)
        turn_until(lambda: not supervisor._strangers)
        sender.join()
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert not supervisor._nodes
    agent = Wire(socket.create_connection(("127.0.0.1", supervisor.port)))
    agent.send(hello="n1", token="TOKEN", port=1)
    turn_until(lambda: "n1" in supervisor._nodes)
    supervisor._listener.close()


def test_half_a_line_is_the_last_that_is_heard() -> None:
    """A peer that reads nothing for too long: the message that did not fit is not followed by another one."""
    left, right = socket.socketpair()
    sender, receiver = Wire(left), Wire(right)
    left.settimeout(0.1)
    right.settimeout(5.0)
    sender.send(words="x" * (1 << 22))
    heard = receiver.receive()
    sender.send(quit=True)
    while heard == []:
        heard = receiver.receive()
    assert heard is None, "the connection has ended"


def test_events_survive_a_line_cut_short(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": 2, "event": "saved"}) + '\n{"time": 3, "ev')
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "events.jsonl").write_text(json.dumps({"time": 1, "event": "job"}) + "\n")
    assert [event["event"] for event in read_events(tmp_path)] == ["job", "saved"]


def test_an_event_after_a_line_cut_short_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / LAUNCHER
    write_event(path, "job", job="5")
    with path.open("a") as file:
        file.write('{"time": 1, "ev')
    write_event(path, "started", attempt=1)
    write_event(path, "done")
    assert [event["event"] for event in read_events(tmp_path)] == ["job", "started", "done"]
    assert path.read_text().count("\n") == 4, "whole lines are not set apart"


@pytest.mark.parametrize("words", ["bad\u2028file", "bad\x85file", "bad\nfile"])
def test_words_of_an_event_do_not_end_its_line(tmp_path: Path, words: str) -> None:
    write_event(tmp_path / LAUNCHER, "failed", words=words)
    (event,) = read_events(tmp_path)
    assert event["words"] == words
