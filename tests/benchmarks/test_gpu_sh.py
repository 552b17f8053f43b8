"""The runner tries every part, keeps what each printed, and says how many failed."""

import os
import subprocess
from pathlib import Path

from tests.benchmarks.scripts import FOLDER


def run(out: Path, python: str, *parts: str) -> subprocess.CompletedProcess[str]:
    settings = {"OUT": str(out), "PYTHON": python, "MINUTES": "5"}
    return subprocess.run([FOLDER / "gpu.sh", *parts], env=os.environ | settings, capture_output=True, text=True)


def test_all_parts_by_default(tmp_path: Path) -> None:
    assert run(tmp_path, "echo").returncode == 0
    said = {path.stem: path.read_text().strip() for path in tmp_path.iterdir()}
    assert said == {
        "tests": "-m pytest -q -m gpu -n 6 tests/gpu/test_kernels.py",
        "runs": "-m pytest -q -m gpu -n 3 tests/gpu/test_one_gpu.py",
        "loss": f"benchmarks/gpu_cross_entropy.py --output {tmp_path}/loss.jsonl --quick",
        "attention": f"benchmarks/gpu_attention.py --output {tmp_path}/attention.jsonl --quick",
        "training": f"benchmarks/gpu_training.py --output {tmp_path}/training.jsonl --minutes 5 --quick",
        "peers": f"benchmarks/gpu_peers.py --output {tmp_path}/peers.jsonl --minutes 5 --quick",
    }
    scripts = [words.split()[0] for words in said.values() if words.startswith("benchmarks")]
    assert len(scripts) == 4 and all((FOLDER.parent / script).is_file() for script in scripts)


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    done = run(tmp_path, "false", "tests", "peers")
    assert done.returncode == 2 and "== peers" in done.stdout


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "echo", "trainings")
    assert done.returncode == 2 and "trainings is no part" in done.stderr
