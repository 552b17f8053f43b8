"""What the GPU benchmarks share: the models, made-up text, clocks, the matmul rate, and results written at once."""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_training import processor

from megalm.config import load
from megalm.data.batch import Batch
from megalm.data.loader import Loader
from megalm.data.mixture import Blended, Mixture
from megalm.data.packing import Packer, window_count
from megalm.data.samples import Order
from megalm.metrics import flops
from megalm.nn.kernels import resolve
from megalm.parallel import device as devices
from megalm.training.config import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "model"


@dataclass(frozen=True)
class Preset:
    """model: a file of configs/model, and what is changed in it. rows, accumulation: of a step."""

    model: str
    changes: dict[str, Any]
    sequence_length: int
    rows: int
    accumulation: int = 4


def _llama(hidden_size: int, num_layers: int, vocab_size: int = 50304) -> dict[str, Any]:
    """Llama's block with heads of 128, the sizes of a GPT of the same hidden size and number of layers."""
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
    }


PRESETS = {
    "tiny": Preset("1m", {"vocab_size": 512, "num_layers": 2}, sequence_length=64, rows=4, accumulation=2),
    "124M": Preset("gpt2-124m", {}, sequence_length=1024, rows=64),
    "1.3B": Preset("1m", _llama(2048, 24), sequence_length=2048, rows=8),
    "2.65B": Preset("1m", _llama(2560, 32), sequence_length=2048, rows=8),
    "8B": Preset("llama-8b", {}, sequence_length=8192, rows=1),
}


def read_config(preset: str, *changes: str, steps: int) -> RunConfig:
    """The run of a preset on one device, for a loader of made-up text. changes: as of --set."""
    chosen = PRESETS[preset]
    own = {f"model.{key}": value for key, value in chosen.changes.items()} | {
        "run.directory": os.devnull,
        "data.sources": [{"path": "synthetic"}],
        "data.tokenizer": "synthetic",
        "train.steps": steps,
        "train.sequence_length": chosen.sequence_length,
        "train.micro_batch_size": chosen.rows,
        "train.global_batch_size": chosen.rows * chosen.accumulation,
        "optimizer.learning_rate": 1e-3 if preset == "tiny" else 3e-4,
        "optimizer.implementation": "torch_fused",  # what DeepSpeed builds first takes a minute of the device
        "schedule.kind": "constant",
        "train.compile": True,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    return load(str(CONFIGS / f"{chosen.model}.yaml"), RunConfig, [*overrides, *changes])


class Synthetic:
    """Made-up text as data.samples.Samples: few ids are frequent and most are rare, as in language, so that the loss
    falls from the first step on and two curves agree only if both sides train alike."""

    def __init__(self, config: RunConfig, document: int = 512) -> None:
        """document: tokens of each, the first at every multiple of it."""
        vocab, length = config.model.vocab_size, config.train.sequence_length
        assert vocab is not None
        draw = np.random.default_rng(config.run.seed)
        share = 1.0 / np.arange(10, vocab + 10)
        self._tokens = draw.choice(vocab, size=2**20, p=share / share.sum())
        self._document = document
        self._packer = Packer(length, pad_id=0, attend_across_documents=config.data.attend_across_documents)
        self.tokens_total = length * 2**20 + 1
        self.corpora = [Blended("synthetic", window_count(self.tokens_total, length), 1.0)]
        self.facts = {"sequence_length": length, "tokenizer": "synthetic"}

    def order(self, seed: int, shuffle: bool) -> Order:
        return Mixture(self.corpora, seed, shuffle)

    def batch(self, rows: Sequence[tuple[int, int] | None], sample_ids: np.ndarray) -> Batch:
        return self._packer.batch([row and (self, row[1]) for row in rows], sample_ids)

    def read_into(self, ids: np.ndarray, start: int) -> list[int]:
        """As a shard's reader (data.index.ShardReader.read_into); the text repeats itself after a million tokens."""
        ids[:] = self._tokens.take(np.arange(start, start + len(ids)), mode="wrap")
        return list(range(-start % self._document, len(ids), self._document))


def synthetic_loader(config: RunConfig) -> Loader:
    """What a run of one process reads, ahead and in a thread as ever."""
    train = config.train
    return Loader(Synthetic(config), rank=0, size=1, seed=config.run.seed,
                  global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size)  # fmt: skip


def train(config: RunConfig, joined: Any, device: torch.device, after_step: Callable[[float], None], draw: bool) -> str:
    """megalm's own loop over its own engine, until config.train.steps, on made-up text. Returns the attention kernel
    that was taken, and why.

    joined: parallel.groups.Groups. after_step: is told the loss. draw: False fills the weights on the device, which for
    billions of them is sooner done than drawing those of step 0, and as good to measure with.
    """
    from megalm.training.build import attention_needs, build_engine, choose_attention
    from megalm.training.callbacks.garbage import GarbageCollection
    from megalm.training.loop import train as loop
    from megalm.training.plan import Plan
    from megalm.training.run import Callback, Run
    from megalm.training.whereabouts import Whereabouts

    class Steps(Callback):
        def after_step(self, run: Run, record: dict[str, Any]) -> None:
            assert record["applied"], f"the gradient norm of step {run.step} is {record['grad_norm']}"
            after_step(record["loss"])

    config, why = choose_attention(config, joined, device)
    attention = resolve(config.model.attention_backend, attention_needs(config, device))
    engine, specs = build_engine(config, joined, device, math.isfinite, draw=draw)
    names = [spec.name for spec in specs]
    if not draw:
        _fill(engine, names, config.run.seed)
    accumulation = config.train.global_batch_size // config.train.micro_batch_size
    unused: Any = None  # nothing is saved here, evaluated or locked
    run = Run(
        Plan(config, joined.layout, accumulation, tokenizer=unused, unproved=""),
        joined,
        engine,
        callbacks=[Steps(), GarbageCollection(config.logging.garbage_collection_every)],
        lock=unused,
        saver=unused,
        beside=unused,
        layer_names=names,
        held_out={},
        loader=synthetic_loader(config),
        facts={},
        whereabouts=Whereabouts(),
    )
    try:
        loop(run)
    finally:
        engine.engine.destroy()  # its hooks would hold it for good, and all that it allocated
    return attention + why


@torch.no_grad()
def _fill(engine: Any, layer_names: list[str], seed: int) -> None:
    """Draw the weights as their specs say, on the device itself."""
    from megalm.nn.init import spec_of
    from megalm.parallel.engine import full_names
    from megalm.parallel.state import WEIGHT

    draw = torch.Generator(engine.device).manual_seed(seed)
    for _, parameter in full_names(engine.module, layer_names):
        spec = spec_of(parameter)
        _, held = engine.state.stretch(parameter)
        if spec.std is None:
            held[WEIGHT].fill_(spec.value)
        else:
            held[WEIGHT].normal_(0.0, spec.std, generator=draw)
    engine.state.publish()


class Laps:
    """The time between marks, by a GPU's own events, so that no mark waits for it, or by a CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every lap, once the device has done them."""
        pairs = list(zip(self._marks, self._marks[1:]))
        if not self._cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def time_calls(call: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 3) -> list[float]:
    """Seconds of each of `repeats` calls, one after the other without waiting in between."""
    for _ in range(warmup):
        call()
    laps = Laps(device)
    laps.mark()
    for _ in range(repeats):
        call()
        laps.mark()
    return laps.seconds()


def matmul_rate(device: torch.device, repeats: int = 20) -> float:
    """FLOP/s of a bare bf16 matrix product here and now, the median: what a real kernel can hope for at most.

    Random numbers, since a GPU's clock is higher while it multiplies zeros.
    """
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(time_calls(lambda: a @ b, device, repeats))


def timing(seconds: Sequence[float]) -> dict[str, float]:
    """Median, and how far the slowest is from the fastest as a share of it."""
    median = statistics.median(seconds)
    return {"seconds": median, "spread": (max(seconds) - min(seconds)) / median}


class Results:
    """A file of JSON lines, each on the disk as soon as it is there, so that a killed run loses none."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, **result: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is")
    made.add_argument("--output", type=Path, default=Path(f"runs/gpu/{name}.jsonl"), metavar="FILE",
                      help="results as JSON lines, added to what is there (default: %(default)s)")  # fmt: skip
    return made


def kernel_parser(doc: str | None, name: str, quick: str) -> argparse.ArgumentParser:
    """parser() of a benchmark that times single kernels. quick: what --quick does."""
    made = parser(doc, name)
    made.add_argument("--preset", choices=("tiny", "full"), default="full", help="tiny: for a CPU")
    made.add_argument("--repeats", type=int, default=10, help="timed calls of each (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help=quick)
    return made


def choose_device(wanted: str) -> torch.device:
    """Must be called before DeepSpeed is imported."""
    return devices.local(devices.choose(wanted))  # type: ignore[arg-type]


def introduce(device: torch.device, results: Results, name: str) -> None:
    """Say, in print and in the results, on what and with which versions this is measured."""
    facts: dict[str, Any] = {"benchmark": name, "time": time.time(), "python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers", "accelerate", "flash-attn", "flash-attn-4", "triton"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        facts |= {"cudnn": torch.backends.cudnn.version(), "peak_flops": flops.peak_flops(properties.name)}
    else:
        facts |= {"device": processor()}
    results.write(**facts)
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value and key != "time"), flush=True)
    if device.type == "cpu":
        print("This is a CPU: the script is tried out, and its figures mean nothing for a GPU.", flush=True)
