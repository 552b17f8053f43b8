"""The command as a user types it: what it prints, what it refuses, and how soon."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import report, slurm
from launch.machines import read_hostfile
from launch.site import Site, Supervision, of_environment
from launch.snapshot import environment as without_secrets
from launch.target import newest_step, of_command
from megalm.errors import MegalmError
from megalm.metrics.events import LAUNCHER, write_event
from tests.training.conftest import build_corpus, tree_of

Launch = Callable[..., subprocess.CompletedProcess[str]]
REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree_of(corpus, tmp_path / "run", train={"micro_batch_size": 2})))
    return str(path)


def test_submit_prints_what_it_would_submit(launch: Launch, config: str, tmp_path: Path) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "4", "--partition", "long", "--account", "7", "--time", "1-00"]
    said = launch("submit", "--config", config, *options, "--set", "train.steps=9", "--dry-run", cwd=REPOSITORY)
    assert said.returncode == 0, said.stderr
    assert said.stdout == (
        f"sbatch --parsable --job-name=run --nodes=2 --gpus-per-node=4 --partition=long --account=7 --time=1-00 "
        f"--output={tmp_path}/run/logs/slurm-%j.log slurm/pretrain.sh {config} --set train.steps=9\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_site_profile_says_the_rest(launch: Launch, config: str, tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("nodes: 2\nranks_per_node: 2\npartition: long\nsbatch: [--qos=night]\n")
    said = launch(
        "submit", "--config", config, "--site", str(profile), "--partition", "short", "--chain", "2", "--dry-run"
    )
    first, second = said.stdout.replace("\n", " ").replace("MEGALM_SITE=", "\nMEGALM_SITE=").split("\n")[1:]
    for line in (first, second):
        assert f"MEGALM_SITE={profile}" in line and "--partition=short" in line and "--qos=night" in line
        assert "supervise.requeue=never" in line and "--no-requeue" in line
    assert "--dependency" not in first and "--dependency=afterany:JOB1" in second


def test_mistakes_are_said_before_anything_is_queued(launch: Launch, config: str, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        ended = launch(*arguments)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
        return ended.stderr.removeprefix("error: ").strip()

    wrong = said("submit", "--config", config, "--nodes", "3", "--gpus-per-node", "8", "--dry-run")
    assert wrong.startswith("train.global_batch_size 16 is not a multiple of train.micro_batch_size 2 x 24")
    assert said("submit", "--config", config, "--site-set", "partitoin=x", "--dry-run").startswith(
        "--site-set partitoin=x: unknown key partitoin; did you mean partition?"
    )
    assert said("status", str(tmp_path)).startswith(f"{tmp_path} is not the folder of a run")
    assert said("job", "megalm/train.py").startswith("launch job runs inside a job of Slurm")
    assert said("submit", "--config", config, "--by", "submitit", "--dry-run").startswith("--by submitit needs a time")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "launch: name what to do, one of submit, local, deepspeed"),
        ("sumbit --config x", "launch: there is no verb sumbit; did you mean submit?"),
        ("submit --confg x", "launch submit has no option --confg; did you mean --config?"),
        ("submit --config x --ndoes=4", "launch submit has no option --ndoes; did you mean --nodes?"),
        (
            "submit --config x --nodes 0",
            "launch submit: --nodes: 0 is not a whole number from 1 on (launch",
        ),
        ("submit --config x --chain -3", "launch submit: --chain: -3 is not a whole number from 1 on"),
        ("submit --config x --nodes", "launch submit: --nodes: expected one argument"),
        ("submit --config /no/x.yaml", "config file /no/x.yaml does not exist"),
        ("submit", "launch submit: the following arguments are required: --config"),
        ("local --config x --ranks two", "launch local: --ranks: two is not a whole number from 1 on"),
        ("local --config CONFIG --ranks 3 --dry-run", "train.global_batch_size 16 is not a multiple of"),
        ("submit --config CONFIG --site /no/s.yaml", "site profile /no/s.yaml does not exist"),
        ("submit --config CONFIG", "sbatch is not on this machine: run this on a login node, or use launch local"),
        ("torchrun --config CONFIG --hostfile HOSTS", "HOSTS:1: 'a slots=0' is not NAME slots=N"),
        (
            "deepspeed --config CONFIG --hostfile /no/hosts",
            "there is no hostfile /no/hosts: write one line",
        ),
        ("agent --join foo", "--join foo is not HOST:PORT"),
        *((f"{verb} /no/run", "/no/run does not exist: name the folder") for verb in ("watch", "report", "cancel")),
        ("cancel RUN", "scontrol is not on this machine: run this on a login node of the cluster"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    from launch.__main__ import main

    records(tmp_path / "done")
    write_event(tmp_path / "done" / LAUNCHER, "submitted", job="7")
    (tmp_path / "hosts").write_text("a slots=0\n")
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm there
    names = {"CONFIG": config, "HOSTS": str(tmp_path / "hosts"), "RUN": str(tmp_path / "done")}
    for name, path in names.items():
        arguments, sentence = arguments.replace(name, path), sentence.replace(name, path)
    monkeypatch.setattr(sys, "argv", ["launch", *arguments.split()])
    with pytest.raises(MegalmError) as refused:
        main()
    assert str(refused.value).startswith(sentence) and "\n" not in str(refused.value)


def test_the_other_launchers(launch: Launch, config: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2 # the first\n\nb slots=2\n")
    torchrun = launch("torchrun", "--config", config, "--hostfile", str(hosts), "--dry-run").stdout.splitlines()
    assert [line.split()[4] for line in torchrun] == ["a", "b"]
    assert "--node-rank 1 --master-addr a" in torchrun[1] and "--nproc-per-node 2" in torchrun[1]
    deepspeed = launch("deepspeed", "--config", config, "--hostfile", str(hosts), "--dry-run").stdout
    assert f"--hostfile {hosts} megalm/train.py --config {config}" in deepspeed.replace(f"{REPOSITORY}/", "")
    assert launch("local", "--config", config, "--ranks", "2", "--dry-run").stdout.startswith("2 x ")
    assert "--num_gpus 2 " in launch("deepspeed", "--config", config, "--ranks", "2", "--dry-run").stdout
    hosts.write_text("a slots=2\na slots=2\n")
    with pytest.raises(MegalmError, match="hosts:2: 'a slots=2' is not NAME slots=N of a machine not named before"):
        read_hostfile(hosts)


@pytest.mark.parametrize(
    ("visible", "ranks", "where"),
    [
        ("4,6", [], "--include localhost:4,6"),
        ("4,6,-1,7", [], "--include localhost:4,6"),
        ("4,6", ["--ranks", "1"], "--include localhost:4"),
        ("", ["--ranks", "2"], "--num_gpus 2"),
        ("-1", [], "--num_gpus 1"),
        ("4,6", ["--ranks", "4"], None),
        ("GPU-8f2a,GPU-91bc", [], None),
    ],
)
def test_deepspeeds_launcher_leaves_the_gpus_of_others_alone(
    config: str,
    visible: str,
    ranks: list[str],
    where: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By itself it takes --num_gpus from the first GPU on, whatever CUDA_VISIBLE_DEVICES says."""
    from launch.__main__ import main

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sys, "argv", ["launch", "deepspeed", "--config", config, *ranks, "--dry-run"])
    if where is None:
        with pytest.raises(
            MegalmError, match=f"cannot put . ranks on CUDA_VISIBLE_DEVICES={visible}: it needs a number"
        ):
            main()
    else:
        assert main() == 0
        assert f" {where} " in capsys.readouterr().out


def test_what_ranks_read_reaches_them(config: str) -> None:
    """sbatch takes the rest of a profile itself; a mapping is as good as its keys."""
    from launch import site
    from launch.submit import submission
    from launch.target import training

    wanted = ["environment={NCCL_DEBUG: INFO}", "supervise={restarts: 9}", "supervise.backoff=3", "nodes=1"]
    made = submission(training(config, []), ["--config", config], wanted)
    inside = site.of_environment(made.environment)
    assert inside.environment == {"NCCL_DEBUG": "INFO"}
    assert (inside.supervise.restarts, inside.supervise.backoff, inside.nodes) == (9, 3, None)


def test_a_job_needs_a_rank(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.job import _ranks_per_node
    from launch.site import Site

    for name, text in (("RANKS_PER_NODE", "0"), ("RANKS_PER_NODE", "x")):
        monkeypatch.setenv(name, text)
        with pytest.raises(MegalmError, match=f"RANKS_PER_NODE: {text} is not a whole number from 1 on"):
            _ranks_per_node(Site())
    monkeypatch.setenv("RANKS_PER_NODE", "3")
    assert _ranks_per_node(Site(ranks_per_node=5)) == 3
    monkeypatch.delenv("RANKS_PER_NODE")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert (_ranks_per_node(Site()), _ranks_per_node(Site(ranks_per_node=5))) == (1, 5)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert _ranks_per_node(Site()) == 8


def test_it_answers_at_once_and_without_torch(config: str) -> None:
    """CPU time, since other processes share the machine."""
    script = (
        "import resource, sys\n"
        f"sys.argv = ['launch', 'submit', '--config', {config!r}, '--nodes', '2', '--dry-run']\n"
        "from launch.__main__ import main\n"
        "main()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'deepspeed', 'matplotlib', 'submitit'} & set(sys.modules)\n"
        "print(used.ru_utime + used.ru_stime, *heavy)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    seconds, *heavy = ended.stdout.splitlines()[-1].split()
    assert not heavy
    assert float(seconds) < 2.0  # 0.4 on a machine that has nothing else to do, 1.1 on a busy one; torch alone takes 2


def test_the_command_of_a_job(config: str, tmp_path: Path) -> None:
    target = of_command(["megalm/train.py", "--config", config, "--set=train.steps=5", "--resume", "never"], tmp_path)
    assert target.folder == tmp_path / "run" and target.config is not None
    assert (target.config.train.steps, target.config.checkpoint.resume) == (5, "never")
    other = of_command(["tools/evaluate_model.py", "--checkpoint", "x"], tmp_path / "jobs")
    assert other.folder == tmp_path / "jobs" and other.arguments[1:] == ["--checkpoint", "x"] and not other.is_done
    with pytest.raises(MegalmError, match="needs a value"):
        of_command(["megalm/train.py", "--config"], tmp_path)
    with pytest.raises(MegalmError, match="has no argument --stpes"):
        of_command(["megalm/train.py", "--config", config, "--stpes"], tmp_path)


def test_a_run_is_done_when_its_last_step_is_saved(config: str, tmp_path: Path) -> None:
    target = of_command(["megalm/train.py", "--config", config], tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-8").mkdir(parents=True)
    (checkpoints / "latest").write_text("step-8\n")
    assert newest_step(tmp_path / "run") == 0 and not target.is_done, "it has no manifest yet"
    (checkpoints / "step-8" / "manifest.json").write_text("{}")
    assert target.is_done


def test_profile_of_the_environment(tmp_path: Path) -> None:
    assert of_environment({}).supervise.restarts == 3
    (tmp_path / "site.yaml").write_text("supervise: {hang_after: 5.0}\n")
    site = of_environment({"MEGALM_SITE": str(tmp_path / "site.yaml"), "MEGALM_SITE_SET": "srun=[-v]\nnodes=2"})
    assert (site.supervise.hang_after, site.srun, site.nodes) == (5.0, ["-v"], 2)


def test_every_key_of_a_profile_is_described() -> None:
    text = (REPOSITORY / "docs" / "launch.md").read_text()
    keys = [*Site.model_fields, *(f"supervise.{key}" for key in Supervision.model_fields)]
    assert not [key for key in keys if f"`{key}`" not in text and key != "supervise"]


def test_secrets_stay_out_of_the_snapshot() -> None:
    said = without_secrets({"WANDB_API_KEY": "abc", "HOME": "/home/x", "PROXY": "http://me:abc@host", "A": "1\n2"})
    assert "abc" not in said and "HOME=/home/x" in said and "PROXY=http://me:(left out)@host" in said
    assert "A='1\\n2'" in said


@pytest.mark.parametrize(
    ("limit", "minutes"), [("30", 30), ("1:30", 2), ("2:00:00", 120), ("1-0", 1440), ("1-2:30", 1590), ("0-0:0:1", 1)]
)
def test_time_limits(limit: str, minutes: int) -> None:
    assert slurm.minutes(limit) == minutes


def test_every_script_only_calls_the_launcher() -> None:
    scripts = sorted((REPOSITORY / "slurm").glob("*.sh"))
    assert [script.name for script in scripts] == ["curate.sh", "evaluate.sh", "pretrain.sh", "sft.sh"]
    for script in scripts:
        called = "-m launch job"
        if script.name == "curate.sh":  # no ranks to launch
            called = '"${MEGALM_FOLDER:-.}/tools/curate.py" --config'
        code = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
        assert len(code) == 1 and code[0].startswith(f'exec "${{PYTHON:-python}}" {called} '), script


def records(run: Path, **more: Any) -> None:
    """A run's folder, as a trainer leaves it."""
    (run / "launch").mkdir(parents=True)
    lines = [
        {"step": n, "loss": 6 - n / 50, "lr": 1e-3, "grad_norm": 1.0, "tokens": 512 * n, "time": n}
        for n in range(1, 101)
    ]
    lines[49] |= {"held_out": {"web <1>": 5.5}, "grad_norm": 400.0}
    lines[70]["loss"] = None  # type: ignore[assignment]
    import json

    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"time": 1.0, "event": "started", "attempt": 1},
        {"time": 50.0, "event": "failed", "rank": 5, "node": "n2", "how": "killed by SIGKILL", "step": 50},
        {"time": 51.0, "event": "started", "attempt": 2},
        {"time": 100.0, "event": "done", "step": 100},
    ]
    (run / "launch" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    ranks = {"hosts": ["n1", "n2"], "p50": [0.1, 0.3], "p90": [0.1, 0.4], "max": [0.2, 0.5]}
    ours = [
        {"time": 99.0, "event": "ranks", "step": 100} | ranks,
        {"time": 99.0, "event": "slow rank", "step": 100, "rank": 1},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in ours))


def test_report_and_watch(launch: Launch, tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    records(tmp_path / "run")
    said = launch("report", str(tmp_path / "run"))
    assert said.returncode == 0, said.stderr
    text = (tmp_path / "run" / "launch" / "report.html").read_text()
    assert "http" not in text, "it is self-contained"
    assert "failed at step 50" in text and "held out: web &lt;1&gt;" in text and "<td class='rank slow'>1<" in text
    assert "prefers-color-scheme: dark" in text and "name=viewport" in text
    pictures = [part.split("</svg>")[0] + "</svg>" for part in text.split("<svg ")[1:]]
    assert len(pictures) == 3, "loss, gradient norm, learning rate; nothing else was recorded"
    for picture in pictures:
        ElementTree.fromstring("<svg " + picture)
    seen = launch("watch", str(tmp_path / "run")).stdout
    assert "step 100 of ?" in seen and "▁" in seen
    refused = launch("report", str(tmp_path / "run"), "--output", str(tmp_path))
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: cannot write {tmp_path} (Is a directory): make room for it, or name another --output\n",
    )
    assert "newest checkpoint: none yet" in launch("status", str(tmp_path / "run")).stdout.splitlines()


def test_axes_have_round_numbers() -> None:
    assert [report._tick(value) for value in report._ticks(1, 24000, 6, whole=True)] == ["5K", "10K", "15K", "20K"]
    assert [report._tick(value) for value in report._ticks(-1e-6, 3.1e-4, 5)] == ["0", "0.0001", "0.0002", "0.0003"]
    assert report._ticks(1, 2, 6, whole=True) == [1, 2], "there is no step between two steps"
    assert [report._tick(value) for value in report._powers(-0.7, 2.3)] == ["1", "10", "100"]
    assert [report._tick(value) for value in report._powers(0.1, 1.4)] == ["2", "5", "10", "20"]


def test_doctor_tells_flash_attn_4_from_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import doctor

    monkeypatch.syspath_prepend(tmp_path)
    before = {finding.what: finding.state for finding in doctor._flash_attention()}
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("raise RuntimeError('never imported')")
    found = {finding.what: finding.state for finding in doctor._flash_attention()}
    assert found == before | {"flash-attn 4": doctor.THERE}
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError('never imported')")
    importlib.invalidate_caches()
    found = {finding.what: finding.state for finding in doctor._flash_attention()}
    assert found == before | {"flash-attn 2": doctor.THERE, "flash-attn 4": doctor.THERE}


def test_doctor_knows_the_wrong_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import doctor

    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (wrong,) = doctor._apex()
    assert wrong.state == doctor.WRONG and wrong.mend.startswith("pip uninstall apex")
    assert "-> pip uninstall apex" in "\n".join(doctor.report([wrong]))
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "__init__.py").touch()
    assert next(doctor._apex()).state == doctor.THERE
    assert doctor.satisfies("0.16.1", ">=0.16,<0.17") and not doctor.satisfies("0.17.0", ">=0.16,<0.17")
    assert not doctor.satisfies("0.19.7", ">=0.19.8") and doctor.satisfies("2.13.0+cpu", ">=2.6")
