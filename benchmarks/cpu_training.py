"""Tokens per second of megalm against Hugging Face's Trainer: the same small Llama, data, batch and settings, on a CPU.

Both start from megalm's weights of step 0 and see the same windows of the same text (Python's documentation topics, as
shards) in the same order, with the same AdamW, schedule, clipping, accumulation and number of threads. Each side runs
in a fresh process, in turn, for several rounds. The first steps are left out, everything else of a step counts: data,
forward, backward, clipping, update and the loop around them. Unless the two loss curves agree, nothing is compared.

megalm: what train.py runs, with its loader, DeepSpeed engine and callbacks; in bf16 with fp32 master weights.
trainer: transformers.Trainer, which in bf16 keeps fp32 weights and casts them under autocast; windows held in memory.
trainer, bf16 weights: the model itself in bf16, without master weights. It does less, and rounds every update to bf16,
so its curve may part from the others; only its first loss is checked.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from megalm.config import load
from megalm.data import shards
from megalm.data.loader import Loader
from megalm.data.packing import Windows
from megalm.errors import MegalmError, main_guard
from megalm.tokenizer.train import train as train_tokenizer
from megalm.training.config import RunConfig

MEGALM, TRAINER, TRAINER_BF16 = "megalm", "trainer", "trainer, bf16 weights"
REQUIRED_RATIO = {"bf16": 1.2, "fp32": 0.0}
TOLERANCE = {"bf16": 5e-3, "fp32": 1e-4}
"""Largest relative difference of two losses of the same step. A bf16 number has 8 significant bits, and the two models
round at different places."""
Clocks = tuple[float, float]
"""Seconds of the wall's clock and of this process's CPU time."""
CONFIG = """
model:
  hidden_size: 384
  num_layers: 6
  num_attention_heads: 6
  num_key_value_heads: 2
  intermediate_size: 1024
  max_position_embeddings: 2048
  vocab_size: 4096
data: {sources: [{path: SHARDS}], tokenizer: TOKENIZER}
train: {global_batch_size: 16, micro_batch_size: 8, sequence_length: 512}
optimizer: {learning_rate: 1.0e-3}
schedule: {warmup_steps: 2}
logging: {progress_bar: "off", every: 1000}
"""


def main() -> int:
    arguments = parse()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = folder
        config = prepare(Path(folder), arguments)
        describe(config, arguments.threads)
        if arguments.profile:
            print_profile(start(MEGALM, arguments))
            return 0
        sides = [MEGALM, TRAINER] + [TRAINER_BF16] * (arguments.precision == "bf16")
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(arguments.rounds):
            rounds.append({side: start(side, arguments) for side in sides})
            if number == 0:
                compare_losses(rounds[0], arguments.precision)
                print(f"\n{'tokens per second':18}" + "".join(f"{side:>24}" for side in sides) + f"{'load':>8}")
            rates = "".join(f"{rounds[-1][side]['tokens_per_second']:>24,.0f}" for side in sides)
            print(f"round {number + 1:<12}{rates}{os.getloadavg()[0]:>8.1f}", flush=True)
    return summarize(rounds, sides, REQUIRED_RATIO[arguments.precision])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each side and round (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=3, help="first steps that do not count (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of either side (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the run; repeatable")
    parser.add_argument("--profile", action="store_true", help="print instead where megalm's time goes")
    parser.add_argument("--side", choices=(MEGALM, TRAINER, TRAINER_BF16), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.skip < arguments.steps:
        raise MegalmError(f"--skip {arguments.skip} leaves nothing of --steps {arguments.steps}: raise the latter")
    return arguments


def prepare(folder: Path, arguments: argparse.Namespace) -> RunConfig:
    """Text, tokenizer and shards in `folder`, and the config that both sides read."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    train_tokenizer(topics.values, 4096).save(folder / "tokenizer")
    shards.write([folder / "text.jsonl"], folder / "tokenizer", folder / "shards")
    names = {"SHARDS": folder / "shards" / "train", "TOKENIZER": folder / "tokenizer"}
    text = CONFIG
    for name, path in names.items():
        text = text.replace(name, json.dumps(str(path)))
    (folder / "config.yaml").write_text(text)
    return read_config(arguments)


def read_config(arguments: argparse.Namespace) -> RunConfig:
    overrides = [f"train.steps={arguments.steps}", f"train.precision={arguments.precision}", *arguments.set]
    # a folder for each process: a run in a folder with a checkpoint would continue it
    overrides.append(f"run.directory={arguments.folder}/run-{os.getpid()}")
    config = load(str(Path(arguments.folder, "config.yaml")), RunConfig, overrides)
    model = config.model
    same = (model.norm, model.position, model.activation, model.rope_scaling, model.qk_norm, model.sliding_window)
    if same != ("rmsnorm", "rotary", "swiglu", None, False, None) or model.attention_bias or model.mlp_bias:
        raise MegalmError("transformers' Llama has no such layers: leave --set model.* to sizes")
    if model.vocab_size != model.padded_vocab_size() or not config.data.attend_across_documents:
        raise MegalmError("keep model.vocab_size a multiple of 128 and data.attend_across_documents true")
    return config


def describe(config: RunConfig, threads: int) -> None:
    train, model = config.train, config.model
    names = ("torch", "deepspeed", "transformers", "accelerate")
    print(f"{processor()}, threads: {threads}; Python {platform.python_version()}, "
          + ", ".join(f"{name} {version(name)}" for name in names))  # fmt: skip
    print(f"{model.num_parameters():,} weights, {train.precision}; {train.global_batch_size} x {train.sequence_length} "
          f"tokens per step in micro-batches of {train.micro_batch_size}; malloc: "
          + (", ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD")))
             or "glibc's defaults"), flush=True)  # fmt: skip


def processor() -> str:
    """The CPU's own name where the system tells."""
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")


def start(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """run_side in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", arguments.folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MegalmError(f"{side} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train; returns tokens per second of the steps that count, on the wall's clock and of CPU time (all threads); the
    losses of all steps; and what --profile found."""
    config = read_config(arguments)
    if arguments.side == MEGALM:
        times, losses, parts = train_megalm(config, profile_from=arguments.skip if arguments.profile else None)
    else:
        times, parts = [], {}
        model, rounded = transformers_model(config), arguments.side == TRAINER_BF16
        losses = train_trainer(
            config,
            model.bfloat16() if rounded else model,
            dataset(windows(config), config.train.steps),
            after_step=lambda: times.append((time.perf_counter(), time.process_time())),
            autocast=config.train.precision == "bf16" and not rounded,
            use_cpu=True,
        )
    tokens = config.train.global_batch_size * config.train.sequence_length * (arguments.steps - arguments.skip)
    wall, cpu = (last - first for first, last in zip(times[arguments.skip - 1], times[-1], strict=True))
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu, "losses": losses, "parts": parts}


def train_megalm(config: RunConfig, profile_from: int | None) -> tuple[list[Clocks], list[float], dict[str, float]]:
    """A run as train.py makes it: the time after each step, the losses, and the parts of steps after `profile_from`."""
    from megalm.parallel import device

    kind = device.choose("cpu")
    from megalm.training.build import build
    from megalm.training.loop import train
    from megalm.training.plan import plan
    from megalm.training.run import Callback, Run

    times: list[Clocks] = []
    losses: list[float] = []
    run = build(plan(config, 1), kind)
    run.say = lambda message: None  # type: ignore[method-assign]
    profile = Profile(run) if profile_from is not None else None

    class Clock(Callback):
        """First of the callbacks: what the others do is part of the next step, and the last checkpoint of none."""

        def after_step(self, run: Run, record: dict[str, Any]) -> None:
            times.append((time.perf_counter(), time.process_time()))
            losses.append(record["loss"])
            if profile and run.step == profile_from:
                profile.start()
            if profile and run.is_last_step:
                profile.stop()

    run.callbacks.insert(0, Clock())
    train(run)
    return times, losses, profile.parts() if profile else {}


def train_trainer(
    config: RunConfig, model: Any, samples: Any, after_step: Callable[[], None], *, autocast: bool, use_cpu: bool
) -> list[float]:
    """The same run by transformers.Trainer over a torch Dataset: the losses of all steps."""
    import torch
    import transformers

    from megalm.optim.schedule import learning_rate

    transformers.utils.logging.set_verbosity_error()
    sums: list[torch.Tensor] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    class Trainer(transformers.Trainer):
        """Keeps the loss of every micro-batch, and takes megalm's learning rates."""

        def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
            sums.append(super().training_step(*given, **options))
            return sums[-1]

        def create_scheduler(self, *_: Any, **__: Any) -> Any:
            def share(step: int) -> float:
                return learning_rate(step, config.schedule, 1.0, config.train.steps)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
            return self.lr_scheduler

    train, optimizer = config.train, config.optimizer
    accumulation = train.global_batch_size // train.micro_batch_size
    settings = transformers.TrainingArguments(
        output_dir=config.run.directory,
        max_steps=train.steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        bf16=autocast,
        use_cpu=use_cpu,
        optim="adamw_torch_fused",
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clipping,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=samples, callbacks=[Clock()]).train()
    return torch.stack(sums).view(train.steps, accumulation).sum(1).tolist()


def windows(config: RunConfig) -> Loader:
    """The run's loader."""
    from megalm.tokenizer.load import load as load_tokenizer

    data, train = config.data, config.train
    samples = Windows(data.sources, load_tokenizer(data.tokenizer), train.sequence_length,
                      attend_across_documents=data.attend_across_documents)  # fmt: skip
    return Loader(samples, rank=0, size=1, seed=config.run.seed, shuffle=data.shuffle,
                  global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size)  # fmt: skip


def dataset(loader: Loader, steps: int) -> Any:
    """Every sample of a run in the loader's order, as a torch Dataset of what transformers' models take."""
    import torch

    with loader:
        batches = list(chain.from_iterable(step for step, _ in islice(loader, steps)))
    tokens = torch.from_numpy(np.concatenate([batch.tokens for batch in batches]))
    labels = torch.from_numpy(np.concatenate([np.where(batch.loss_mask, batch.labels, -100) for batch in batches]))

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            # transformers shifts labels itself unless they are given as shift_labels
            return {"input_ids": tokens[index], "labels": labels[index], "shift_labels": labels[index]}

    return Samples()


def transformers_model(config: RunConfig) -> Any:
    """transformers' model with megalm's weights of step 0, converted as a checkpoint would be; a bf16 run rounds them
    to bf16. In fp32."""
    import torch
    import transformers

    from megalm.convert import architectures
    from megalm.models.decoder import build_model, decoder
    from megalm.nn.layers import Layers

    ours = config.model
    architecture = architectures.of_model(ours)
    theirs = architecture.write(ours)
    kind = transformers.AutoConfig.for_model(theirs.pop("model_type"), use_cache=False, **theirs)
    for name in vars(kind):
        if name.endswith(("dropout", "pdrop")):  # GPT-2's are 0.1 unless told otherwise
            setattr(kind, name, 0.0)
    model = getattr(transformers, architecture.model_class)(kind)
    weights = build_model(decoder(ours, Layers(), seed=0), config.run.seed).named_weights()

    def weight(name: str) -> torch.Tensor:
        drawn = weights[name].detach()
        return drawn.bfloat16().float() if config.train.precision == "bf16" else drawn

    converted = {
        entry.theirs: entry.mapping.export([weight(name) for name in entry.ours], ours)
        for entry in architectures.entries(architecture, ours)
    }
    missing = model.load_state_dict(converted, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == ["lm_head.weight"] * ours.tie_word_embeddings
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model


def compare_losses(results: dict[str, dict[str, Any]], precision: str) -> None:
    """Print every side's curve; raises MegalmError where they should agree and do not."""
    print(f"\n{'loss':24}{'first step':>12}{'last step':>12}{'largest difference':>22}")
    reference = np.array(results[MEGALM]["losses"])
    for side, result in results.items():
        losses = np.array(result["losses"])
        differences = np.abs(losses / reference - 1)
        print(f"{side:24}{losses[0]:>12.5f}{losses[-1]:>12.5f}{differences.max():>22.1e}")
        worst = differences[0] if side == TRAINER_BF16 else differences.max()
        if not worst < TOLERANCE[precision]:
            raise MegalmError(f"{side} does not train the same model: its losses are {losses}, megalm's {reference}")


def summarize(rounds: list[dict[str, dict[str, Any]]], sides: list[str], required: float) -> int:
    """Print medians and the ratios of each round; 1 if the promise is not kept."""

    def ratios(side: str, rate: str) -> list[float]:
        return [results[MEGALM][rate] / results[side][rate] for results in rounds]

    print(f"\n{'tokens per second':24}{'median':>12}{'min':>12}{'max':>12}   megalm is faster by, each round")
    for side in sides:
        rates = [results[side]["tokens_per_second"] for results in rounds]
        row = "".join(f"{value:>12,.0f}" for value in (statistics.median(rates), min(rates), max(rates)))
        print(f"{side:24}{row}   " + " ".join(f"{ratio:.2f}" for ratio in ratios(side, "tokens_per_second")))
    print()
    for side in sides[1:]:
        wall, cpu = (statistics.median(ratios(side, rate)) for rate in ("tokens_per_second", "tokens_per_cpu_second"))
        wanted = f" (required: {required})" if side == TRAINER and required else ""
        print(f"megalm / {side} = {wall:.2f}{wanted}; by CPU time, which other processes disturb less: {cpu:.2f}")
    return 0 if statistics.median(ratios(TRAINER, "tokens_per_second")) >= required else 1


class Profile:
    """Where a run's time goes: every operation counts for the innermost part of the model or the loop around it, and
    an operation of the backward pass for the part whose forward operation it differentiates."""

    def __init__(self, run: Any) -> None:
        import torch

        from megalm.models.decoder import Embedding, Head
        from megalm.nn.attention import Attention
        from megalm.nn.block import Block
        from megalm.nn.feedforward import FeedForward
        from megalm.nn.norm import RMSNorm

        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._seconds = 0.0
        parts = {
            torch.nn.Linear: "matrix products",
            Head: "matrix products",
            Attention: "attention, rotation",
            RMSNorm: "norms",
            FeedForward: "SwiGLU",
            Block: "residuals",
            Embedding: "embedding",
        }
        self._model = {*parts.values(), "loss"}
        for module in run.engine.module.modules():
            if type(module) in parts:
                _name(module, "forward", parts[type(module)])
        engine = run.engine.engine
        _name(run.engine, "step", "megalm's engine")
        _name(run.engine, "_loss", "loss")
        _name(engine, "forward", "DeepSpeed: forward")
        _name(engine, "backward", "DeepSpeed: gradients to fp32, reduction")
        _name(engine, "step", "DeepSpeed: norm, clipping, copies")
        _name(getattr(engine.optimizer, "optimizer", engine.optimizer), "step", "AdamW")

    def start(self) -> None:
        self._profiler.start()
        self._seconds = -time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter()
        self._profiler.stop()

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        events = sorted(self._profiler.events(), key=lambda event: event.time_range.start)
        forward: dict[int, str] = {}  # of the operation that made a node of the graph, by the node's number
        for event in events:
            # an operation that makes no node bears the number of the next one that does
            if event.sequence_nr >= 0 and (part := _part(event, {})) in self._model:
                forward[event.sequence_nr] = part
        seconds: dict[str, float] = defaultdict(float)
        for event in events:
            if part := _part(event, forward):
                seconds[part] += event.self_cpu_time_total / 1e6
        seconds["data, loop, callbacks"] = self._seconds - sum(seconds.values())
        return dict(seconds)


_PREFIX = "part: "


def _name(owner: Any, method: str, part: str) -> None:
    """Record every call of owner.method under the name of a part."""
    import torch

    right = getattr(owner, method)

    def named(*given: Any, **options: Any) -> Any:
        with torch.profiler.record_function(_PREFIX + part):
            return right(*given, **options)

    setattr(owner, method, named)


def _ancestors(event: Any) -> Iterator[Any]:
    """The event, what called it, what called that, ..."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _part(event: Any, forward: dict[int, str]) -> str:
    for each in _ancestors(event):
        if each.name.startswith(_PREFIX):
            return each.name.removeprefix(_PREFIX)
        if _is_backward(each) and forward.get(each.sequence_nr):
            return forward[each.sequence_nr]
    return ""


def print_profile(result: dict[str, Any]) -> None:
    total = sum(result["parts"].values())
    print(f"\n{'where the time goes':44}{'seconds':>9}{'share':>8}")
    for part, seconds in sorted(result["parts"].items(), key=lambda item: -item[1]):
        print(f"{part:44}{seconds:>9.2f}{seconds / total:>8.1%}")


if __name__ == "__main__":
    main_guard(main)
