"""Jobs on a real Slurm cluster. Those marked `slurm` take minutes each (make test-slurm)."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.metrics.events import LAUNCHER, read_events, write_event
from tests.slurm.faults import BATCH, REPOSITORY, Cluster, Experiment, apart, strike, tree


def wait(reached: Callable[[], bool], what: str, patience: float = 300) -> None:
    deadline = time.time() + patience
    while not reached():
        assert time.time() < deadline, f"{what} within {patience:.0f} s"
        time.sleep(0.2)


def script(cluster: Cluster, tmp_path: Path, text: str, *options: str, **variables: str) -> str:
    """Submit a job whose ranks, one on each of two nodes, run a script that is no training."""
    (tmp_path / "script.py").write_text("import os, sys, time\n" + text)
    command = f"exec {sys.executable} -m launch job {tmp_path}/script.py"
    said = cluster.call(
        *("sbatch", "--parsable", "--nodes=2", "--requeue", f"--output={tmp_path}/log", "--open-mode=append"),
        *(f"--chdir={tmp_path}", *options, "--wrap", command),
        PYTHONPATH=str(REPOSITORY),
        **variables,
    )
    return said.strip()


def events_of(tmp_path: Path, job: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(tmp_path / "runs" / "jobs" / job) if event["event"] == kind]


def test_a_script_runs_on_all_nodes_and_is_requeued_until_it_is_done(cluster: Cluster, tmp_path: Path) -> None:
    text = """
count = os.environ.get("SLURM_RESTART_COUNT", "0")
open(f"{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}-{count}", "w").close()
sys.exit(0 if count == "1" else 75)
"""
    job = script(cluster, tmp_path, text)
    wait(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the job ends")
    log = (tmp_path / "log").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", log
    assert {path.name for path in tmp_path.glob("*-of-*")} == {f"{r}-of-2-{c}" for r in (0, 1) for c in (0, 1)}
    assert log.count(f"launch: requeueing job {job}") == 1 and log.count("launch: done") == 1, "one appended log"
    kinds = [event["event"] for event in read_events(tmp_path / "runs" / "jobs" / job)]
    assert kinds == ["job", "started", "stopped", "requeued", "job", "started", "done"]


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    job = script(cluster, tmp_path, "open(os.environ['RANK'], 'w').close()\ntime.sleep(600)")
    wait(lambda: (tmp_path / "1").exists(), "the ranks start")
    cluster.call("scancel", job)
    wait(lambda: cluster.job(job)["JobState"] == "CANCELLED", "the job is cancelled")
    time.sleep(2)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert "requeued" not in [event["event"] for event in read_events(tmp_path / "runs" / "jobs" / job)]


STOPS = """
import signal, socket
count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

def stop(number, frame):
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
open(f"{socket.gethostname()}-{count}", "w").close()
"""
"""A rank that ends as a trainer does when it is told to, and notes where it ran in which start of the job."""


def test_a_node_that_failed_twice_stays_excluded(cluster: Cluster, tmp_path: Path) -> None:
    """The ranks of n2 die; the job goes on with the other node, and from its next start on with another in place."""
    text = STOPS + "if socket.gethostname() == 'n2': sys.exit(1)\ntime.sleep(600 if count < 3 else 0)"
    # Each of its ends is without a new checkpoint: there is none of a script.
    site = {"MEGALM_SITE_SET": "supervise.backoff=0.5\nsupervise.restarts=4"}
    job = script(cluster, tmp_path, text, "--nodelist=n1", **site)
    assert cluster.job(job)["ExcNodeList"] == "(null)"
    wait(lambda: len(events_of(tmp_path, job, "started")) == 3, "it goes on without n2")
    assert events_of(tmp_path, job, "started")[-1]["nodes"] == ["n1"]
    cluster.call(sys.executable, "-m", "launch", "requeue", str(tmp_path / "runs" / "jobs" / job))
    wait(lambda: (tmp_path / "n3-1").exists(), "another node takes the place of n2")
    assert cluster.job(job)["ExcNodeList"] == "n2"
    (requeued,) = events_of(tmp_path, job, "requeued")
    assert requeued["excluded"] == ["n2"]
    # However it is requeued from then on: by others, who know of no node that failed, and again by itself.
    cluster.call("scontrol", "requeue", job)
    wait(lambda: (tmp_path / "n3-2").exists(), "it starts again")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the job ends")
    assert (cluster.job(job)["JobState"], cluster.job(job)["ExcNodeList"]) == ("COMPLETED", "n2")
    assert not list(tmp_path.glob("n2-[1-9]"))


def test_a_node_stays_where_there_is_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """All nodes but n2 are too few for the job: it is not left in the queue for good."""
    text = STOPS + "if socket.gethostname() == 'n2' and count == 0: sys.exit(1)\ntime.sleep(600 if count == 0 else 0)"
    job = script(cluster, tmp_path, text, f"--nodes={cluster.nodes}", MEGALM_SITE_SET="supervise.backoff=0.5")
    wait(lambda: len(events_of(tmp_path, job, "started")) == 3, "it goes on without n2")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the job ends")
    assert (cluster.job(job)["JobState"], cluster.job(job)["ExcNodeList"]) == ("COMPLETED", "(null)")
    assert "n2 may be given again" in (tmp_path / "log").read_text()


def test_the_next_job_of_a_chain_keeps_off_it_too(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import job as jobs
    from launch.site import Site
    from launch.target import Target

    numbers: list[str] = []
    for options in (["--nodelist=n1"], ["--dependency=afterany:{0}"]):
        given = [option.format(*numbers) for option in options]
        said = cluster.call(
            "sbatch", "--parsable", "--no-requeue", "--nodes=2", "--output=/dev/null", *given, "--wrap", "sleep 600"
        )
        numbers.append(said.strip())
        write_event(tmp_path / LAUNCHER, "submitted", job=numbers[-1])
    first, second = numbers
    wait(lambda: cluster.job(first)["JobState"] == "RUNNING", "the first job starts")
    monkeypatch.setenv("SLURM_CONF", str(cluster.state / "slurm.conf"))
    before = {each: signal.getsignal(each) for each in jobs.SIGNALS}
    try:
        jobs._again(Target([], tmp_path), Site(), first, ["n2"], must_move=False)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        cluster.call("scancel", first)
    wait(lambda: cluster.job(second)["JobState"] == "RUNNING", "the second job starts")
    assert cluster.job(second)["ExcNodeList"] == "n2"
    assert "n2" not in cluster.call("scontrol", "show", "hostnames", cluster.job(second)["NodeList"]).split()
    cluster.call("scancel", second)


@pytest.mark.slurm
def test_a_controller_that_is_away_is_asked_again(cluster: Cluster, tmp_path: Path) -> None:
    """A job that wants to go back into the queue while Slurm's controller is restarted."""
    job = script(cluster, tmp_path, STOPS + "time.sleep(600 if count == 0 else 0)")
    wait(lambda: (tmp_path / "n1-0").exists() and (tmp_path / "n2-0").exists(), "the ranks start")
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    with cluster.without_controller():
        wait(lambda: "asking again" in (tmp_path / "log").read_text(), "the job finds no controller")
    wait(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the job ends")
    assert cluster.job(job)["JobState"] == "COMPLETED"
    assert len(events_of(tmp_path, job, "requeued")) == 1


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("signal_option", "told"),
    [
        ("--signal=B:USR1@30", "SIGUSR1"),
        ("--signal=B:CONT@1", "SIGTERM"),  # a warning that says nothing: what ends it is the limit itself
    ],
)
def test_a_real_time_limit(cluster: Cluster, tmp_path: Path, signal_option: str, told: str) -> None:
    """Slurm's own clock, whose resolution is a minute: the job goes on in its next start until it is done."""
    text = STOPS + "time.sleep(600 if count == 0 else 0)"
    job = script(cluster, tmp_path, text, "--time=3", signal_option)
    # TIMEOUT is a state on the way where the limit itself ends it.
    wait(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the job ends", 600)
    assert cluster.job(job)["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert [event["signal"] for event in events_of(tmp_path, job, "stopped")] == [told]
    assert [event["start"] for event in events_of(tmp_path, job, "job")] == [0, 1]


@pytest.mark.slurm
def test_a_training_goes_on_after_a_real_time_limit(
    cluster: Cluster, slurm_corpus: Path, whole: Experiment, tmp_path: Path
) -> None:
    """Three minutes, of which the last may be the warning's: too few for all steps, as slow as they are here."""
    plant = [{"rank": 1, "samples": BATCH, "do": "slow", "seconds": 3.0}]
    run = Experiment(cluster, tree(slurm_corpus, tmp_path / "run"), plant=plant)
    (job,) = run.submit("--time", "3", "--site-set", "sbatch=[--signal=B:USR1@60]")
    run.wait_for_end(job)
    assert run.difference(whole) == ""
    stops = run.events("stopped")
    assert stops and {event["signal"] for event in stops} == {"SIGUSR1"}
    assert len(run.events("requeued")) == len(stops)


def test_a_training_survives_a_requeue_and_a_killed_rank(
    cluster: Cluster, slurm_corpus: Path, whole: Experiment, tmp_path: Path
) -> None:
    run = Experiment(cluster, tree(slurm_corpus, tmp_path / "run"))
    (job,) = run.submit()
    strike(run, job, "killed rank", 4)
    strike(run, job, "scontrol requeue", 12)
    run.wait_for_end(job)
    assert run.difference(whole) == ""
    wait(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the job ends")
    snapshot = run.run / "launch" / f"{job}-1"
    assert "-m launch job megalm/train.py" in (snapshot / "script.sh").read_text()
    assert (snapshot / "nodes.txt").read_text().split() == run.events("job")[1]["nodes"]
    assert "torch==" in (snapshot / "packages.txt").read_text()
    assert f"SLURM_JOB_ID={job}" in (snapshot / "environment.txt").read_text()


@pytest.mark.slurm
def test_a_chain_of_jobs_that_may_not_be_requeued(
    cluster: Cluster, slurm_corpus: Path, whole: Experiment, tmp_path: Path
) -> None:
    run = Experiment(cluster, tree(slurm_corpus, tmp_path / "run"))
    first, second = run.submit("--chain", "2")
    run.wait_for_step(9, first)
    cluster.call("scancel", "--batch", "--signal=USR1", first)
    run.wait_for_end(second)
    assert run.difference(whole) == ""
    assert [event["job"] for event in run.events("job")] == [first, second]
    assert not run.events("requeued")


@pytest.mark.slurm
def test_submitit_requeues_at_its_own_signal(
    cluster: Cluster, slurm_corpus: Path, whole: Experiment, tmp_path: Path
) -> None:
    run = Experiment(cluster, tree(slurm_corpus, tmp_path / "run"))
    (job,) = run.submit("--by", "submitit", "--time", "120")
    run.wait_for_step(9, job)
    cluster.call("scancel", "--signal=USR2", job)
    run.wait_for_end(job)
    assert run.difference(whole) == ""
    assert [event["start"] for event in run.events("job")] == [0, 1]


@pytest.mark.slurm
def test_the_layout_changes_after_a_fault(
    cluster: Cluster, slurm_corpus: Path, whole: Experiment, tmp_path: Path
) -> None:
    """The rank on n2 is killed at the same step in every start, until the run goes on without that node, as one
    data-parallel rank in place of two; once it is requeued, another node makes it two again."""
    steps = 20
    made = tree(slurm_corpus, tmp_path / "run", train={"steps": steps})
    plant = [
        {"node": "n2", "samples": 7 * BATCH, "do": "kill"},
        {"rank": 0, "samples": 8 * BATCH, "do": "slow", "seconds": 1.0},  # so that it is still there to be requeued
    ]
    run = Experiment(cluster, made, plant=plant)
    (job,) = run.submit("--site-set", "sbatch=[--nodelist=n1]")
    run.wait_for_step(12, job)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    run.wait_for_end(job)
    assert [event["nodes"] for event in run.events("started")] == [["n1", "n2"], ["n1", "n2"], ["n1"], ["n1", "n3"]]
    assert run.apart(whole) == ""
    # Negative control: a run that had lost a step would be seen.
    late = [record | {"step": record["step"] - 1} for record in run.records()[1:]]
    assert "loss" in apart(late, whole.records())


@pytest.mark.slurm
def test_a_slow_rank_and_a_hanging_one_of_eight_are_named(cluster: Cluster, slurm_corpus: Path, tmp_path: Path) -> None:
    plant = [
        {"rank": 6, "samples": BATCH, "do": "slow", "seconds": 0.5},
        {"rank": 1, "samples": 12 * BATCH, "do": "hang"},
    ]
    made = tree(slurm_corpus, tmp_path / "run", parallel={"pipeline": 2}, logging={"stragglers_every": 10})
    site = ("supervise.hang_after=60", "supervise.restarts=0")
    run = Experiment(cluster, made, nodes=4, ranks_per_node=2, site=site, plant=plant)
    (job,) = run.submit()
    wait(lambda: bool(run.events("gave up")), "the hang is noticed", 1500)
    (slow,) = run.events("slow rank")
    assert slow["rank"] == 6
    (hung,) = run.events("hung")
    assert hung["rank"] == 1
    assert hung["places"][0].startswith("rank 1 (n1) is in data loading, step 12, since ")
    assert any("rank 5 (n3) waits in pipeline receive of micro-batch 1 from rank 1" in line for line in hung["places"])
    assert Path(hung["stacks"]).read_text().count("==== rank") == 8


@pytest.mark.slurm
def test_an_evaluation_over_two_nodes_says_what_one_process_says(
    cluster: Cluster, whole: Experiment, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    tasks = [str(REPOSITORY / "configs" / "eval" / "perplexity.yaml")]
    found = {}
    for name, tensor in (("one", 1), ("two", 2)):
        output = tmp_path / f"{name}.json"
        arguments = ["--checkpoint", str(whole.run), "--tasks", *tasks, "--device", "cpu", "--output", str(output)]
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        said = cluster.call(
            *("sbatch", "--parsable", f"--nodes={tensor}", f"--output={tmp_path}/{name}.log"),
            *(f"--chdir={REPOSITORY}", str(REPOSITORY / "slurm" / "evaluate.sh"), *arguments, f"--tensor={tensor}"),
            **environment,
        )
        job = said.strip()
        wait(lambda job=job: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the job ends")  # type: ignore[misc]
        log = (tmp_path / f"{name}.log").read_text()
        assert cluster.job(job)["JobState"] == "COMPLETED", log
        assert "local_perplexity" in log, "the table comes at the end"
        [found[name]] = json.loads(output.read_text())["results"].values()
    assert found["two"]["bits_per_byte,none"] == pytest.approx(found["one"]["bits_per_byte,none"], rel=1e-5)
