"""Inject faults into runs on a real Slurm cluster, and count what they cost: python -m tests.slurm.faults --output FILE

The cluster is of several nodes on this machine (slurm-up.sh). Each run is submitted as users submit it, hit by
every fault in turn, and must end, by itself, with the records of a run that nothing happened to, bit for bit, having
taken the same samples.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalm.metrics.events import read_events

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
STEPS, BATCH = 60, 16
PATIENCE = 1500.0


class Cluster:
    """A Slurm cluster of n1, n2, ... on this machine."""

    def __init__(self, state: Path, nodes: int):
        self.state, self.nodes = state, nodes

    def _script(self, name: str, *arguments: str) -> None:
        # Eight GPUs are the script's default; these nodes have none.
        settings = {
            "SLURM_LAB_STATE": str(self.state),
            "SLURM_LAB_NODES": str(self.nodes),
            "SLURM_LAB_GPUS": "0",
            "SLURM_LAB_CONF": "KillWait=30",  # as Slurm has it by default
        }
        done = subprocess.run(
            ["bash", str(HERE / name), *arguments], env=os.environ | settings, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr or done.stdout}")

    def up(self, *node: str) -> None:
        self._script("slurm-up.sh", *node)

    def down(self, *node: str) -> None:
        self._script("slurm-down.sh", *node)

    def call(self, *command: str, **variables: str) -> str:
        environment = os.environ | {"SLURM_CONF": str(self.state / "slurm.conf")} | variables
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """slurmctld does not answer meanwhile."""
        lines = (self.state / "pids").read_text().splitlines()
        (process,) = (int(line.split()[0]) for line in lines if line.endswith(" slurmctld"))
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process, signal.SIGCONT)

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", number)))


@dataclass(frozen=True)
class Result:
    """moment: steps done when the fault struck. restarted: seconds until the ranks were started again. lost: seconds
    until the run was one step further."""

    fault: str
    moment: int
    restarted: float
    lost: float


@dataclass
class Experiment:
    """A run on the cluster. tree: its config; it records the samples it takes."""

    cluster: Cluster
    tree: dict[str, Any]
    nodes: int = 2
    ranks_per_node: int = 1
    site: tuple[str, ...] = ()
    plant: list[dict[str, Any]] = field(default_factory=list)
    """See sitecustomize.py."""
    cut: str = ""
    """The node that lost its power last."""

    @property
    def run(self) -> Path:
        return Path(self.tree["run"]["directory"])

    @property
    def ids(self) -> Path:
        return self.run.with_name(self.run.name + ".ids")

    def submit(self, *options: str) -> list[str]:
        config = self.run.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(self.tree))
        self.ids.mkdir(exist_ok=True)
        site = [part for each in ("supervise.backoff=1", *self.site) for part in ("--site-set", each)]
        printed = self.cluster.call(
            *(sys.executable, "-m", "launch", "submit", "--config", str(config), "--nodes", str(self.nodes)),
            *("--ranks-per-node", str(self.ranks_per_node), *site, *options),
            PYTHON=sys.executable,
            PYTHONPATH=f"{HERE}:{REPOSITORY}",
            MEGALM_RECORD=str(self.ids),
            MEGALM_PLANT=json.dumps(self.plant),
        )
        return re.findall(r"submitted job (\d+)", printed)

    def records(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError):
            return []

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run) if event["event"] == kind]

    def wait_for_step(self, step: int, job: str, patience: float = PATIENCE) -> None:
        self._wait(lambda: bool(self.records()) and self.records()[-1]["step"] >= step, job, patience)

    def wait_for_end(self, job: str, patience: float = PATIENCE) -> None:
        self._wait(lambda: bool(self.events("done")), job, patience)

    def _wait(self, reached: Callable[[], bool], job: str, patience: float) -> None:
        deadline = time.time() + patience
        while not reached():
            state = self.cluster.job(job)["JobState"]
            dead = state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED")
            if (dead and not reached()) or time.time() > deadline:
                raise RuntimeError(f"job {job} is {state}: {self.log()[-3000:]}")
            time.sleep(0.3)

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted((self.run / "logs").glob("*")))

    def difference(self, whole: "Experiment") -> str:
        """What differs from a run that nothing happened to; empty if nothing does."""
        clock = ("time", "tokens_per_second", "memory")
        ours, theirs = (
            [{k: v for k, v in record.items() if k not in clock} for record in each.records()] for each in (self, whole)
        )
        if ours != theirs:
            steps = [a["step"] for a, b in zip(ours, theirs, strict=False) if a != b]
            return f"another curve, from step {steps[0] if steps else len(ours)}"
        if self.samples() != whole.samples():
            return "other samples"
        taken = [number for numbers in self.samples().values() for number in numbers]
        if len(taken) != len(set(taken)) or len(taken) != STEPS * BATCH:
            return "samples lost or repeated"
        if len(self.events("done")) != 1:
            return f"done {len(self.events('done'))} times"
        return ""

    def apart(self, whole: "Experiment") -> str:
        """What differs from a run that nothing happened to by more than another layout may, as far as this one goes;
        empty if nothing does."""
        ours, theirs = self.samples(), whole.samples()
        if ours != {samples: theirs[samples] for samples in ours} or len(ours) != len(self.records()):
            return "other samples"
        return apart(self.records(), whole.records())

    def samples(self) -> dict[int, list[int]]:
        """Of the steps that stand: the numbers of the samples that all ranks took, in the last start that took them."""
        lines = [line for path in self.ids.glob("rank-*.jsonl") for line in path.read_text().splitlines()]
        taken = sorted(map(json.loads, lines), key=lambda record: record["time"])
        last = {record["samples"]: record["start"] for record in taken}
        found: dict[int, list[int]] = {}
        for record in taken:
            samples = record["samples"]
            if samples <= STEPS * BATCH and record["start"] == last[samples]:
                found[samples] = sorted(found.get(samples, []) + record["ids"])
        return found


def apart(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Which of loss and gradient norm are farther from those of the same steps in another layout than sums in another
    order are; empty if none is. How far that is, is what holds for every change of a layout."""
    from tests.training.test_another_layout import LOSS, NORM, worst

    theirs = theirs[: len(ours)]
    if [record["step"] for record in ours] != [record["step"] for record in theirs]:
        return "other steps"
    found = ((key, worst(ours, theirs, key), limit) for key, limit in (("loss", LOSS), ("grad_norm", NORM)))
    return ", ".join(f"{key} off by {distance:.1e}" for key, distance, limit in found if distance > limit)


def requeue(run: Experiment, job: str) -> None:
    run.cluster.call("scontrol", "requeue", job)


def warning(run: Experiment, job: str) -> None:
    """What sbatch --signal=B:USR1@120 makes Slurm send before the time limit."""
    run.cluster.call("scancel", "--batch", "--signal=USR1", job)


def preemption(run: Experiment, job: str) -> None:
    """A job of the higher partition takes all nodes for some seconds."""
    run.cluster.call(
        *("sbatch", "--partition=high", f"--nodes={run.cluster.nodes}", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 3"),
    )


def killed_rank(run: Experiment, job: str) -> None:
    """kill -9 of the last rank, in its node."""
    for each in Path("/proc").glob("[0-9]*"):
        try:
            variables = (each / "environ").read_bytes().split(b"\0")
            last = f"RANK={run.nodes * run.ranks_per_node - 1}".encode()
            if last in variables and f"MEGALM_RECORD={run.ids}".encode() in variables:
                os.kill(int(each.name), 9)
        except OSError:
            continue


def power_cut(run: Experiment, job: str) -> None:
    """The second node of the job is gone without a word, and comes back when the run goes on without it."""
    run.cut = run.events("job")[-1]["nodes"][-1]
    run.cluster.down(run.cut)


FAULTS: dict[str, Callable[[Experiment, str], None]] = {
    "killed rank": killed_rank,
    "time-limit signal": warning,
    "scontrol requeue": requeue,
    "preemption": preemption,
    "power cut": power_cut,
}


Blow = tuple[str, int]
"""A fault, and the step after which it strikes."""


def strike(run: Experiment, job: str, fault: str, moment: int) -> Result:
    """Hit `run` once it has done `moment` steps, and wait until it is a step further than it was."""
    run.wait_for_step(moment, job)
    hit, starts = time.time(), len(run.events("started"))
    FAULTS[fault](run, job)
    deadline = time.time() + PATIENCE
    while len(run.events("started")) == starts and not run.events("done") and time.time() < deadline:
        time.sleep(0.2)
    step = run.records()[-1]["step"]  # a run that is told to stop finishes its step first
    if fault == "power cut":
        run.cluster.up(run.cut)
    started = next((event["time"] for event in run.events("started")[starts:]), hit)
    assert step < STEPS, f"{fault} came after the last step: the run is too quick for this machine"
    run.wait_for_step(step + 1, job)
    further = next(record["time"] for record in run.records() if record["step"] == step + 1)
    return Result(fault, step, round(started - hit, 1), round(further - hit, 1))


def survive(run: Experiment, whole: Experiment, blows: list[Blow]) -> tuple[list[Result], str]:
    """One run, hit by several faults in turn: what each cost, and what differs in the end ("" if nothing)."""
    job = run.submit()[0]
    results = [strike(run, job, *blow) for blow in blows]
    run.wait_for_end(job)
    return results, run.difference(whole)


def tree(corpus: Path, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    from tests.training.conftest import tree_of

    made = tree_of(
        corpus,
        directory,
        **{
            "train": {"steps": STEPS, "micro_batch_size": 2},
            "schedule": {"total_steps": STEPS, "warmup_steps": 2},
            "checkpoint": {"every": 5, "keep_last": 3},
            "evaluate": {"every": 0, "sequences": 8},
        }
        | sections,
    )
    made["run"]["device"] = "cpu"
    return made


def courses(number: int) -> list[list[Blow]]:
    """Every fault once in every course, each time at another moment."""
    names = list(FAULTS)
    moments = [3 + 10 * n for n in range(len(names))]
    return [list(zip([*names[k:], *names[:k]], moments, strict=True)) for k in range(number)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="each is hit by every fault, in another order")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument(
        "--state", type=Path, default=Path(tempfile.gettempdir()) / "megalm-slurm", help="the cluster's"
    )
    parser.add_argument("--output", type=Path, help="JSON lines of the results, appended")
    given = parser.parse_args()
    from tests.training.conftest import build_corpus

    cluster = Cluster(given.state, given.nodes)
    cluster.up()
    lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        corpus = folder / "corpus"
        try:
            if not corpus.exists():
                corpus.mkdir(parents=True)
                build_corpus(corpus)
            whole = Experiment(cluster, tree(corpus, folder / "whole"))
            if not whole.events("done"):
                whole.wait_for_end(whole.submit()[0])
            for number, blows in enumerate(courses(given.runs)):
                run = Experiment(cluster, tree(corpus, folder / f"run-{number}"))
                results, difference = survive(run, whole, blows)
                lost += bool(difference)
                for result in results:
                    line = json.dumps(asdict(result) | {"run": number, "difference": difference})
                    print(line, flush=True)
                    if given.output:
                        with given.output.open("a") as file:
                            file.write(line + "\n")
        finally:
            cluster.down()
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
