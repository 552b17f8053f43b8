"""The command as a user types it: what it refuses, how it is stopped, and the launchers it runs under."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import run_ranks
from tests.training.runs import curve, train_run

Settings = Callable[..., dict[str, Any]]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))  # where the environment need not be on the path
COMMAND = [sys.executable, str(REPOSITORY / "megalm" / "train.py")]
STEPS = 20

# Python runs this file of ours in every process at its start. It tells at the end what the process has imported, or
# kills a rank.
SPY = """
import atexit, importlib.util, json, os, sys

def report():
    found = {
        "path": sys.path,
        "imported": sorted(sys.modules),
        "shadowed": [n for n in ("config", "data", "metrics", "layout", "nn") if importlib.util.find_spec(n)],
    }
    with open(os.environ["SPY_REPORT"], "w") as file:
        json.dump(found, file)

if "SPY_REPORT" in os.environ and "train.py" in " ".join(sys.orig_argv):
    atexit.register(report)
if os.environ.get("SPY_KILL", "-") == os.environ.get("RANK"):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a user's shell, without what the tests have set, and with the spy."""
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    if shutil.which("nvidia-smi") is None:
        kept.pop("DS_ACCELERATOR", None)
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "spy")}


@pytest.fixture
def config(settings: Settings, tmp_path: Path) -> Callable[..., str]:
    """Writes the config file of a run in tmp_path/NAME; its path."""

    def write(name: str = "run", **sections: dict[str, Any]) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree(settings, name, **sections)))
        return str(path)

    return write


def tree(settings: Settings, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    made = settings(name, **{"run": {"directory": settings(name)["run"]["directory"], "device": "cpu"}} | sections)
    return made | {
        "train": made["train"] | {"steps": STEPS},
        "schedule": {"total_steps": STEPS, "warmup_steps": 2},
        "checkpoint": {"every": 3},
    }


def run(arguments: list[str], environment: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=120, **options
    )


def refused(arguments: list[str], environment: dict[str, str], tmp_path: Path) -> str:
    """The one line that the command says on stderr, before anything slow is imported."""
    environment = environment | {"SPY_REPORT": str(tmp_path / "report")}
    ended = run(arguments, environment)
    assert ended.returncode == 2 and ended.stdout == "", ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    imported = json.loads((tmp_path / "report").read_text())["imported"]
    assert not {"torch", "deepspeed", "megatron"} & set(imported)
    return ended.stderr.removeprefix("error: ").strip()


def test_mistakes_are_said_in_one_line_before_anything_slow(
    config: Callable[..., str], environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    path = config()

    def said(*arguments: str) -> str:
        return refused(["--config", path, *arguments], environment, tmp_path)

    misspelt = said("--set", "train.micro_batchsize=4")
    assert misspelt == (
        "--set train.micro_batchsize=4: unknown key train.micro_batchsize; did you mean train.micro_batch_size?"
    )
    missing = refused(["--config", path.replace("run.yaml", "rum.yaml")], environment, tmp_path)
    assert missing == f"config file {tmp_path}/rum.yaml does not exist; did you mean {path}?"
    assert said("--set", "data.sources.0.path=nowhere") == (
        "there is no shard folder nowhere: correct the path, or run tools/write_shards.py"
    )
    shutil.copytree(corpus / "shards" / "train", tmp_path / "shards")
    os.truncate(tmp_path / "shards" / "shard-000000.tar", 1000)
    truncated = said("--set", f"data.sources.0.path={tmp_path / 'shards'}")
    assert truncated.startswith(f"the shard file {tmp_path}/shards/shard-000000.tar is truncated (1,000 bytes, ")
    assert said("--set", f"run.directory={path}/run").startswith(f"run.directory {path}/run cannot be used, {path} is")
    assert said("--set", "parallel.tensor=3").startswith("parallel.tensor 3 x parallel.pipeline 1 = 3 does not divide")
    assert not (tmp_path / "run").exists()


def test_a_launched_mistake_says_which_rank_speaks(config: Callable[..., str], environment: dict[str, str]) -> None:
    arguments = ["--config", config(), "--set", "train.step=4"]
    first, second = (run(arguments, environment | {"RANK": str(rank)}).stderr for rank in (0, 1))
    assert first.startswith("error: --set train.step=4: unknown key train.step; did you mean train.steps")
    assert second == f"[rank 1] {first}"


def test_print_config_round_trips(config: Callable[..., str], environment: dict[str, str], tmp_path: Path) -> None:
    first = run(["--config", config(), "--set", "train.steps=7", "--resume", "never", "--print-config"], environment)
    assert first.returncode == 0 and first.stderr == ""
    resolved = yaml.safe_load(first.stdout)
    assert resolved["train"]["steps"] == 7 and resolved["checkpoint"]["resume"] == "never"
    assert resolved["optimizer"]["beta2"] == 0.95, "defaults are shown too"
    (tmp_path / "printed.yaml").write_text(first.stdout)
    second = run(["--config", str(tmp_path / "printed.yaml"), "--print-config"], environment)
    assert second.stdout == first.stdout


def test_modules_of_megalm_shadow_nobodys(
    config: Callable[..., str], environment: dict[str, str], tmp_path: Path
) -> None:
    """From any working folder, with a config named relative to it; a module called `config` there stays reachable."""
    config()
    report = tmp_path / "report"
    for place in (tmp_path, REPOSITORY / "megalm"):
        path = os.path.relpath(tmp_path / "run.yaml", place)
        ended = run(["--config", path, "--print-config"], environment | {"SPY_REPORT": str(report)}, cwd=place)
        assert ended.returncode == 0, ended.stderr
        found = json.loads(report.read_text())
        assert str(REPOSITORY / "megalm") not in [str(Path(entry).resolve()) for entry in found["path"] if entry]
        assert found["shadowed"] == []
        assert "megalm.config" in found["imported"] and "config" not in found["imported"]
    # Negative control: without the lines at the top of train.py, the spy sees the folder.
    (tmp_path / "config.py").touch()
    (tmp_path / "bare-train.py").touch()
    subprocess.run([sys.executable, tmp_path / "bare-train.py"], env=environment | {"SPY_REPORT": str(report)})
    assert json.loads(report.read_text())["shadowed"] == ["config"]


@pytest.fixture
def whole(settings: Settings, corpus: Path) -> list[dict[str, Any]]:
    """The curve of the run, by one process that nobody interrupts; once for all tests."""
    uninterrupted = tree(settings, "whole", run={"directory": str(corpus / "uninterrupted")})
    if not (corpus / "uninterrupted").exists():
        assert run_ranks(1, train_run, uninterrupted) == [0]
    return curve(uninterrupted)


def start(path: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, "--config", path], env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(lines: int, metrics: Path, process: subprocess.Popen[str]) -> None:
    """Until the run has written `lines` records."""
    deadline = time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_that_is_interrupted_and_killed_is_the_uninterrupted_one(
    config: Callable[..., str],
    settings: Settings,
    environment: dict[str, str],
    whole: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    path, metrics = config(), tmp_path / "run" / "metrics.jsonl"
    process = start(path, environment)
    wait_for(4, metrics, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    stopped = int(re.search(r"SIGINT received: saving after step (\d+), then exiting with 75", said).group(1))  # type: ignore[union-attr]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{stopped}"

    process = start(path, environment)
    wait_for(min(stopped + 4, STEPS - 4), metrics, process)
    process.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert f"continuing from step {stopped} of {STEPS}" in said

    assert run(["--config", path], environment).returncode == 0
    assert curve(tree(settings, "run")) == whole

    again = run(["--config", path, "--resume", "never"], environment)
    assert (again.returncode, again.stderr) == (
        2,
        f"error: {tmp_path}/run already holds a run (at step-{STEPS}): choose another run.directory, "
        "or --resume auto to continue it\n",
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)


def same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["tokens"] == theirs["tokens"]


def deepspeed(ranks: int, path: str, *arguments: str) -> list[str]:
    launcher = [DEEPSPEED, "--num_gpus", str(ranks), "--master_port", free_port()]
    return [*launcher, "megalm/train.py", "--config", path, *arguments]


def test_deepspeeds_launcher(
    config: Callable[..., str], settings: Settings, environment: dict[str, str], whole: list[dict[str, Any]]
) -> None:
    ended = launched(deepspeed(4, config(), "--set", "parallel.tensor=2", "--set", "parallel.pipeline=2"), environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("starting at step 0") == 1, "one rank speaks"
    assert "pipeline 2 x data 1 x tensor 2 = 4 ranks" in ended.stdout
    same_curve(curve(tree(settings, "run")), whole)


def test_a_killed_launch_goes_on_under_other_layouts(
    config: Callable[..., str],
    settings: Settings,
    environment: dict[str, str],
    whole: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """kill -9 for the launcher and all its ranks, twice, each time in another layout."""
    path, metrics = config(), tmp_path / "run" / "metrics.jsonl"
    layouts = ((2, ("--set", "parallel.zero=3")), (4, ("--set", "parallel.tensor=2", "--set", "parallel.pipeline=2")))
    for lines, (ranks, arguments) in zip((7, 13), layouts, strict=True):
        process = subprocess.Popen(
            deepspeed(ranks, path, *arguments),
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        wait_for(lines, metrics, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    ended = run(["--config", path], environment)
    assert ended.returncode == 0, ended.stderr
    assert "was written by pipeline 2 x data 1 x tensor 2: reading it as pipeline 1 x data 1 x tensor 1" in ended.stdout
    found = curve(tree(settings, "run"))
    same_curve(found, whole)
    assert [record["samples"] for record in found] == [16 * step for step in range(1, STEPS + 1)]


def test_a_rank_that_dies_ends_the_launcher_in_error(config: Callable[..., str], environment: dict[str, str]) -> None:
    ended = launched(deepspeed(2, config()), environment | {"SPY_KILL": "1"})
    assert ended.returncode != 0
    assert "starting at step 0" not in ended.stdout


def test_torchrun(
    config: Callable[..., str], settings: Settings, environment: dict[str, str], whole: list[dict[str, Any]]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    ended = launched([*torchrun, "megalm/train.py", "--config", config()], environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    same_curve(curve(tree(settings, "run")), whole)
