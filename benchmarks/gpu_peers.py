"""megalm beside Hugging Face Trainer and plain DeepSpeed on one GPU: the same model, batch, sequence and precision.

All start from megalm's weights of step 0, converted by megalm's own tables, and see the same made-up text in the same
order, with the same AdamW (torch's fused one), decay, clipping and accumulation. Each runs in a fresh process, in turn,
for several rounds; the first steps do not count, everything of the others does, by CUDA events. Unless the loss curves
agree, nothing is compared.

megalm: its own loop and engine, as train.py runs them (bf16 with fp32 master weights and gradients).
trainer: transformers.Trainer with bf16=True (fp32 weights under autocast), attention by torch's SDPA.
deepspeed: transformers' model in deepspeed.initialize with ZeRO 1 and bf16, fp32 gradient sums, and a bare loop.

Promised on a GPU: at least 1.3 times the tokens per second of the Trainer.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from cpu_training import MEGALM, TRAINER, compare_losses, dataset, train_trainer, transformers_model
from gpu_measure import (
    PRESETS,
    Laps,
    Results,
    choose_device,
    introduce,
    parser,
    read_config,
    synthetic_loader,
    timing,
    train,
)

from megalm.errors import MegalmError, main_guard
from megalm.training.config import RunConfig

DEEPSPEED = "deepspeed"
SIDES = (MEGALM, TRAINER, DEEPSPEED)
REQUIRED = 1.3
"""Of megalm over the Trainer, on a GPU."""


def main() -> int:
    arguments = parse()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return 0
    results = Results(arguments.output)
    device = choose_device(arguments.device)
    introduce(device, results, "peers")
    until = time.time() + 60 * arguments.minutes
    missed = False
    for preset in arguments.preset or ["124M", "1.3B"]:
        rounds: list[dict[str, dict[str, Any]]] = []
        sides = list(SIDES)
        while len(rounds) < arguments.rounds and time.time() < until:
            found = {side: start(side, preset, arguments) for side in sides}
            results.write(model=preset, round=len(rounds) + 1, **found)
            sides = [side for side in sides if "refused" not in found[side]]
            if MEGALM not in sides:
                raise MegalmError(f"megalm does not train {preset}: {found[MEGALM]['refused']}")
            if not rounds:
                compare_losses({side: found[side] for side in sides}, arguments.precision)
                print(f"\n{'tokens per second':20}" + "".join(f"{side:>12}" for side in sides), flush=True)
            rates = "".join(f"{found[side]['tokens_per_second']:>12,.0f}" for side in sides)
            print(f"{preset:9} round {len(rounds) + 1:<4}{rates}", flush=True)
            rounds.append(found)
        if not rounds:
            print(f"{preset}: --minutes {arguments.minutes:g} are over")
            continue
        ratios = {side: median_ratio(rounds, side) for side in sides if side != MEGALM}
        results.write(model=preset, ratios=ratios)
        for side, ratio in ratios.items():
            wanted = f" (required: {REQUIRED})" if side == TRAINER and device.type == "cuda" else ""
            print(f"{preset}: megalm / {side} = {ratio:.2f}{wanted}", flush=True)
        missed |= device.type == "cuda" and ratios.get(TRAINER, REQUIRED) < REQUIRED
    return 1 if missed else 0


def parse() -> argparse.Namespace:
    made = parser(__doc__, "peers")
    made.add_argument("--preset", action="append", choices=PRESETS, help="repeatable; default: 124M and 1.3B")
    made.add_argument("--rows", type=int, help="of a micro-batch; default: half of what megalm alone would take")
    made.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    made.add_argument("--steps", type=int, default=8, help="that count (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    made.add_argument("--quick", action="store_true", help="one round of 4 steps that count after 2")
    made.add_argument("--minutes", type=float, default=8.0, help="no round starts after them (default: %(default)s)")
    made.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.quick:
        given.steps, given.warmup, given.rounds = 4, 2, 1
    return given


def start(side: str, preset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """run_side in a fresh process, or why it cannot run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--preset", preset, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no reason given"])[-1]
        print(f"{preset}, {side}: exit code {done.returncode}: {reason}", flush=True)
        return {"refused": reason}
    return json.loads(done.stdout.splitlines()[-1])


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train; the losses of all steps, and the time and tokens per second of those that count."""
    preset = arguments.preset[-1]
    rows = arguments.rows or max(1, PRESETS[preset].rows // 2)
    config = read_config(preset, f"train.precision={arguments.precision}", f"train.micro_batch_size={rows}",
                         f"train.global_batch_size={rows * PRESETS[preset].accumulation}",
                         steps=arguments.warmup + arguments.steps)  # fmt: skip
    device = choose_device(arguments.device)
    laps, losses, done = Laps(device), [], 0

    def mark() -> None:
        nonlocal done
        done += 1
        if done >= arguments.warmup:
            laps.mark()

    if arguments.side == MEGALM:
        losses = train_megalm(config, device, mark)
    elif arguments.side == TRAINER:
        with tempfile.TemporaryDirectory() as folder:
            config = config.model_copy(update={"run": config.run.model_copy(update={"directory": folder})})
            samples = dataset(synthetic_loader(config), config.train.steps)
            losses = train_trainer(config, transformers_model(config), samples, mark,
                                   autocast=arguments.precision == "bf16", use_cpu=device.type == "cpu")  # fmt: skip
    else:
        losses = train_deepspeed(config, device, mark)
    seconds = laps.seconds()
    tokens = config.train.global_batch_size * config.train.sequence_length
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    found = timing(seconds)
    return {"losses": losses, "step_seconds": seconds, **found, "tokens_per_second": tokens / found["seconds"],
            "peak_memory": peak}  # fmt: skip


def train_megalm(config: RunConfig, device: torch.device, mark: Any) -> list[float]:
    from megalm.layout import Layout
    from megalm.parallel import groups

    losses = []

    def after_step(loss: float) -> None:
        losses.append(loss)
        mark()

    groups.start(device)
    train(config, groups.create(Layout()), device, after_step=after_step, draw=True)
    groups.destroy()
    return losses


def train_deepspeed(config: RunConfig, device: torch.device, mark: Any) -> list[float]:
    """A loop as DeepSpeed's own documentation has it."""
    import deepspeed

    from megalm.parallel import groups

    groups.start(device)
    settings, optimizer = config.train, config.optimizer
    model = transformers_model(config).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )
    accumulation = settings.global_batch_size // settings.micro_batch_size
    described = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    if settings.precision == "bf16":
        described |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    with groups.quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=described)
    rows = torch.utils.data.DataLoader(
        dataset(synthetic_loader(config), settings.steps),
        batch_size=settings.micro_batch_size,
        pin_memory=device.type == "cuda",
    )
    losses: list[torch.Tensor] = []
    for number, batch in enumerate(rows, start=1):
        loss = engine(**{name: value.to(device, non_blocking=True) for name, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if number % accumulation == 0:
            mark()
    return torch.stack(losses).view(settings.steps, accumulation).float().mean(1).tolist()


def median_ratio(rounds: list[dict[str, dict[str, Any]]], side: str) -> float:
    """megalm's tokens per second over a side's, of each round, the median."""
    return statistics.median(each[MEGALM]["tokens_per_second"] / each[side]["tokens_per_second"] for each in rounds)


if __name__ == "__main__":
    main_guard(main)
