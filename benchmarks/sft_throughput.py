"""Trained tokens per second of fine-tuning: megalm, packed and sorted, against TRL's SFTTrainer, padded and packed.

All sides start from megalm's weights of step 0 of one small Llama and go once through the same conversations, with the
same chat template, mask (the assistant's tokens), precision, rows per micro-batch, longest row, optimizer and threads.
Each runs in a fresh process, in turn. The first step is left out, everything else counts: data, forward, backward,
update and the loop around them; turning rows into ids does not. What is compared is trained tokens, not positions, so
padding is paid for. TRL's gradient checkpointing, on by default, is off.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from cpu_training import processor, transformers_model

from megalm.config import load
from megalm.errors import MegalmError, main_guard
from megalm.sft.open import open_task
from megalm.tokenizer.chat import CHATML
from megalm.tokenizer.load import load as load_tokenizer
from megalm.training.config import RunConfig
from megalm.training.samples import open_samples

PACKED, SORTED, TRL, TRL_PACKED = "megalm, packed", "megalm, sorted", "TRL, padded", "TRL, packed"
SIDES = [PACKED, SORTED, TRL, TRL_PACKED]
REQUIRED = 1.3
"""Of megalm packed over TRL padded."""
CONFIG = """
model:
  hidden_size: 256
  num_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 704
task: {template: chatml}
data: {sources: [{path: ROWS}], tokenizer: TOKENIZER}
train: {steps: 1, global_batch_size: 8, micro_batch_size: 4, sequence_length: 512}
optimizer: {learning_rate: 1.0e-4}
logging: {progress_bar: "off", every: 1000}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="conversations (default: %(default)s)")
    parser.add_argument("--data", metavar="FILE", help="of conversations; default: made of Python's documentation")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the run; repeatable")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run_side(given)))
        return 0
    with tempfile.TemporaryDirectory() as given.folder:
        prepare(Path(given.folder), given)
        config = read_config(given)
        print(f"{processor()}, threads: {given.threads}; "
              + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")))  # fmt: skip
        train = config.train
        print(f"{config.model.num_parameters():,} weights, {given.precision}; micro-batches of "
              f"{train.micro_batch_size} rows of at most {train.sequence_length} tokens", flush=True)  # fmt: skip
        rounds = []
        for number in range(given.rounds):
            rounds.append({side: start(side, given) for side in SIDES})
            if number == 0:
                print(open_samples(config, load_tokenizer(config.data.tokenizer), task_of(config)).sets[0].report)
                print(f"{'':18}{'steps':>8}{'trained':>10}{'of positions':>14}{'first loss':>12}{'last loss':>12}")
                for side, result in rounds[0].items():
                    print(f"{side:18}{result['steps']:>8}{result['trained']:>10,}"
                          f"{result['trained'] / result['positions']:>14.1%}"
                          f"{result['losses'][0]:>12.4f}{result['losses'][-1]:>12.4f}")  # fmt: skip
                print(f"\n{'trained tokens/s':18}" + "".join(f"{side:>18}" for side in SIDES) + f"{'load':>8}")
            rates = "".join(f"{rounds[-1][side]['rate']:>18,.0f}" for side in SIDES)
            print(f"round {number + 1:<12}{rates}{os.getloadavg()[0]:>8.1f}", flush=True)
    print()
    for side in SIDES[1:]:
        wall, cpu = (statistics.median(each[PACKED][rate] / each[side][rate] for each in rounds)
                     for rate in ("rate", "cpu_rate"))  # fmt: skip
        wanted = f" (required: {REQUIRED})" if side == TRL else ""
        print(f"{PACKED} / {side} = {wall:.2f}{wanted}; by CPU time, which other processes disturb less: {cpu:.2f}")
    kept = statistics.median(each[PACKED]["rate"] / each[TRL]["rate"] for each in rounds) >= REQUIRED
    return 0 if kept else 1


def prepare(folder: Path, given: argparse.Namespace) -> None:
    """Conversations, a tokenizer that both read, and the config, in `folder`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4093, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    built.train_from_iterator(topics.values(), trainer)
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (folder / "tokenizer").mkdir()
    built.save(str(folder / "tokenizer" / "tokenizer.json"))
    rows = folder / "rows.jsonl"
    if given.data:
        lines = Path(given.data).read_text(encoding="utf-8").removesuffix("\n").split("\n")[: given.rows]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        # Lengths as in instruction data: half of the answers are below 100 tokens, some are ten times as long.
        generator, text = random.Random(0), "".join(topics.values())

        def cut(median: float) -> str:
            at, size = generator.randrange(len(text) // 2), int(generator.lognormvariate(0, 1) * median) + 20
            return text[at : at + size].strip() or "x"

        said = ({"user": cut(120), "assistant": cut(300)} for _ in range(given.rows))
        messages = ([{"role": role, "content": content} for role, content in each.items()] for each in said)
        rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    config = CONFIG
    for name, path in {"ROWS": rows, "TOKENIZER": folder / "tokenizer"}.items():
        config = config.replace(name, json.dumps(str(path)))
    (folder / "config.yaml").write_text(config)


def read_config(given: argparse.Namespace, *more: str) -> RunConfig:
    own = (f"train.precision={given.precision}", "model.vocab_size=4096", *more)
    folder = f"run.directory={given.folder}/run-{os.getpid()}"
    return load(str(Path(given.folder, "config.yaml")), RunConfig, [*own, *given.set, folder])


def task_of(config: RunConfig) -> Any:
    assert config.task
    return open_task(config.task, config.data, load_tokenizer(config.data.tokenizer), config.train.sequence_length)


def start(side: str, given: argparse.Namespace) -> dict[str, Any]:
    """run_side in a fresh process."""
    settings = {
        "OMP_NUM_THREADS": str(given.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", given.folder]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise MegalmError(f"{side} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_side(given: argparse.Namespace) -> dict[str, Any]:
    """Once through the data: trained tokens and positions of all steps, losses, and trained tokens per second."""
    arrangement = "packed" if given.side == PACKED else "sorted"
    config = read_config(given, f"task.arrangement={arrangement}")
    ends: list[tuple[float, float]] = []
    trained: list[int] = []
    run = train_trl if given.side in (TRL, TRL_PACKED) else train_megalm
    positions, losses = run(config, given, ends, trained)
    wall, cpu = (last - first for first, last in zip(ends[0], ends[-1]))
    tokens = sum(trained[1:])
    return {"steps": len(ends), "trained": sum(trained), "positions": positions, "losses": losses,
            "rate": tokens / wall, "cpu_rate": tokens / cpu}  # fmt: skip


def train_megalm(
    config: RunConfig, given: argparse.Namespace, ends: list[tuple[float, float]], trained: list[int]
) -> tuple[int, list[float]]:
    from megalm.parallel import device

    samples = open_samples(config, load_tokenizer(config.data.tokenizer), task_of(config))
    steps = samples.corpora[0].samples // config.train.global_batch_size
    config = read_config(given, f"task.arrangement={config.task.arrangement}", f"train.steps={steps}")  # type: ignore[union-attr]
    kind = device.choose("cpu")
    from megalm.training.build import build
    from megalm.training.loop import train
    from megalm.training.plan import plan
    from megalm.training.run import Callback, Run

    losses: list[float] = []
    positions = 0
    run = build(plan(config, 1), kind)
    run.say = lambda message: None  # type: ignore[method-assign]
    step = run.engine.step

    def counting(batches: Any, *rest: Any) -> Any:
        nonlocal positions
        positions += sum(labels.numel() for _, (labels, _) in batches)
        return step(batches, *rest)

    run.engine.step = counting  # type: ignore[method-assign]

    class Clock(Callback):
        """First of the callbacks: the last checkpoint is part of no step."""

        def after_step(self, run: Run, record: dict[str, Any]) -> None:
            ends.append((time.perf_counter(), time.process_time()))
            trained.append(record["tokens"] - sum(trained))
            losses.append(record["loss"])

    run.callbacks.insert(0, Clock())
    train(run)
    return positions, losses


def train_trl(
    config: RunConfig, given: argparse.Namespace, ends: list[tuple[float, float]], trained: list[int]
) -> tuple[int, list[float]]:
    import datasets
    import transformers
    import trl

    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(config.data.tokenizer, "tokenizer.json")),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    positions, counted = 0, 0

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))
            trained.append(counted - sum(trained))

    class Trainer(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            nonlocal positions, counted
            positions += inputs["labels"].numel()
            counted += int((inputs["labels"][:, 1:] != -100).sum())
            return super().training_step(model, inputs, *rest, **options)

    train, optimizer = config.train, config.optimizer
    settings = trl.SFTConfig(
        output_dir=config.run.directory,
        num_train_epochs=1,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.global_batch_size // train.micro_batch_size,
        max_length=train.sequence_length,
        packing=given.side == TRL_PACKED,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=train.precision == "bf16",
        use_cpu=True,
        optim="adamw_torch_fused",
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clipping,
        dataloader_drop_last=True,
        dataloader_num_workers=0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    with open(config.data.sources[0].path, encoding="utf-8") as lines:
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    trainer = Trainer(
        transformers_model(config), settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    return positions, [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main_guard(main)
