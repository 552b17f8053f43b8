"""How long a checkpoint holds up training, against a plain synchronous write of the same bytes, on a CPU.

A small Llama trains with train.py's own parts and saves every few steps, each step written down with its seconds.
Counted is all that a save costs training: the time in which no step could start (the copy into host memory, and waiting
for the save before), and by how much the steps that run beside the writing are slower than those that do not.

plain: one file per save, of the same bytes, written and synced where the checkpoints go, training standing still. The
least that any synchronous save must do: no checksum, no second file, no rename.

Promised: training stands still for at most a fifth of a plain write.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from megalm.data import shards
from megalm.errors import main_guard
from megalm.tokenizer.train import train as train_tokenizer
from megalm.training.config import RunConfig

PROMISED = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512, help="default: %(default)s (about 40M parameters)")
    parser.add_argument("--saves", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=6, help="steps between saves (default: %(default)s)")
    parser.add_argument("--directory", help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        steps, saves, bytes_saved = train(Path(folder), arguments)
        plain = [plain_write(Path(folder) / "plain", bytes_saved) for _ in range(arguments.saves)]
    return report(steps, saves, plain, bytes_saved)


def settings(folder: Path, arguments: argparse.Namespace) -> RunConfig:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    train_tokenizer(topics.values, 4096).save(folder / "tokenizer")
    shards.write([folder / "text.jsonl"], folder / "tokenizer", folder / "shards")
    return RunConfig.model_validate(
        {
            "run": {"directory": str(folder / "run"), "device": "cpu"},
            "model": {"hidden_size": arguments.hidden_size, "num_layers": 10, "num_attention_heads": 8},
            "data": {"sources": [{"path": str(folder / "shards" / "train")}], "tokenizer": str(folder / "tokenizer")},
            "train": {
                "steps": arguments.every * (arguments.saves + 1),
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "sequence_length": 256,
            },
            "checkpoint": {"every": arguments.every, "keep_last": 1},
            "logging": {"progress_bar": "off", "every": 1000},
        }
    )


def train(folder: Path, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[float], int]:
    """Train and save; each step's seconds and whether a save was being written, each save's, and a save's bytes."""
    from megalm.parallel import device, groups
    from megalm.training import resume
    from megalm.training.build import build
    from megalm.training.loop import train as loop
    from megalm.training.plan import plan
    from megalm.training.run import Callback, Run

    run = build(plan(settings(folder, arguments), 1), device.choose("cpu"))
    steps: list[dict[str, Any]] = []
    saves: list[float] = []

    class Watch(Callback):
        """Last of the callbacks: what the save before it took, and whether the next step runs beside its writing."""

        writing = False

        def after_step(self, run: Run, record: dict[str, Any]) -> None:
            steps.append({"seconds": seconds.pop(), "writing": self.writing})
            self.writing = run.step % arguments.every == 0 and not run.is_last_step
            if self.writing:
                saves.append(run.blocked)

    class Seconds(Callback):
        """First of them: the record loses its seconds on the way."""

        def after_step(self, run: Run, record: dict[str, Any]) -> None:
            seconds.append(record["seconds"])

    seconds: list[float] = []
    run.callbacks[:] = [Seconds(), *run.callbacks, Watch()]
    loop(run)
    newest = resume.checkpoints.newest(resume.directory(run.config))
    assert newest is not None
    total = sum(path.stat().st_size for path in newest.iterdir())
    groups.destroy()
    return steps, saves, total


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes that lie in memory."""
    content = bytearray(os.urandom(1 << 20)) * (size >> 20)
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def report(steps: list[dict[str, Any]], blocked: list[float], plain: list[float], size: int) -> int:
    quiet = statistics.median(step["seconds"] for step in steps[2:] if not step["writing"])
    busy = [step["seconds"] for step in steps if step["writing"]]
    slower = sum(seconds - quiet for seconds in busy) / len(blocked)
    wall = statistics.median(plain)
    print(
        f"torch {version('torch')}, deepspeed {version('deepspeed')}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{size / 1e6:,.0f} MB a checkpoint, {len(blocked)} saves, a step takes {quiet:.2f} s")
    print(f"{'seconds':52}{'median':>9}{'min':>9}{'max':>9}{'share':>9}")
    for name, values in (("plain synchronous write and sync", plain), ("training stands still at a save", blocked)):
        middle = statistics.median(values)
        print(f"{name:52}{middle:9.3f}{min(values):9.3f}{max(values):9.3f}{middle / wall:9.2f}")
    print(f"{'steps beside the writing are slower, in all, a save':52}{slower:9.3f}{'':18}{slower / wall:9.2f}")
    ratio = statistics.median(blocked) / wall
    print(f"stands still for {ratio:.2f} of a plain write (promised: at most {PROMISED})")
    return 0 if ratio <= PROMISED else 1


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main_guard(main)
