"""Training speed on one GPU: tokens per second, MFU and memory of four models, and what each lever of the config gives.

Drives what train.py drives: megalm's loop over the engine that training/build.py makes, its loader in its thread, and
every step from one end of the loop to the next, by CUDA events. Only the text is made up and the weights of step 0 are
drawn on the device. A preset takes as many rows per micro-batch as are predicted to fit, and fewer blocks if one row
does not (the table says so).

base: the fastest settings that are known. The other rungs of the ladder change one of them each; fp32 is there for its
losses. MFU is of the peak that the vendor names, by 6 N and by 6 N + 12 L H Q T per token; `of matmul` is the latter as
a share of the rate of a bare matrix product just after; `loss` is how far the losses of the steps are from the base's
at most, relatively. More than 1 %, or a loss that does not fall, is an error: what is fast and wrong is not shown.

Each model runs in a process of its own, first all bases and then the ladders, until --minutes are over.
"""

import argparse
import gc
import math
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from gpu_measure import (
    PRESETS,
    Laps,
    Results,
    choose_device,
    introduce,
    matmul_rate,
    parser,
    read_config,
    timing,
    train,
)

from megalm.errors import MegalmError, main_guard, reason
from megalm.metrics import flops
from megalm.metrics.meters import format_bytes
from megalm.nn.kernels import BACKENDS
from megalm.nn.norm import resolve_norm
from megalm.parallel import device as devices
from megalm.training.config import RunConfig
from megalm.training.memory import ROOM, Memory, predict

SAME = 0.01
"""Largest relative difference between the losses of two rungs at any step."""
SHOWN = 25
"""Kernels of a profile that are printed; all are in the results."""
HEAD = ("model", "rung", "tokens/s", "s/step", "spread", "MFU 6N", "MFU", "of matmul", "peak", "predicted", "loss")


def main() -> int:
    arguments = parse()
    if arguments.until:
        return work(arguments)
    presets = arguments.preset or [name for name in PRESETS if name != "tiny"]
    # The whole set is worth more than one ladder; one model's ladder begins with its base.
    jobs = [(preset, ["--rung", "base"]) for preset in presets if len(presets) > 1 and not arguments.rung]
    jobs += [(preset, []) for preset in sorted(presets, key=lambda name: name != "1.3B")]
    until = time.time() + 60 * arguments.minutes
    failed = 0
    for preset, more in jobs:
        command = [sys.executable, __file__, *sys.argv[1:], *more, "--until", str(until), "--worker", preset]
        if time.time() > until:
            print(f"{preset}: not begun, --minutes {arguments.minutes:g} are over")
            continue
        try:
            failed += subprocess.run(command, timeout=until - time.time()).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{preset}: stopped after --minutes {arguments.minutes:g}; what was measured is in the file")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    made = parser(__doc__, "training")
    made.add_argument("--preset", action="append", choices=PRESETS, help="repeatable; default: all but tiny")
    made.add_argument("--steps", type=int, default=8, help="that count (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="3 steps that count after 2")
    made.add_argument("--rung", action="append", metavar="TEXT", help="only those whose names hold it; repeatable")
    made.add_argument("--minutes", type=float, default=8.0, help="of all models together (default: %(default)s)")
    made.add_argument("--profile", action="store_true", help="where the time of one more step goes, by kernel")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change every run; repeatable")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.quick:
        given.steps, given.warmup = 3, 2
    return given


def work(arguments: argparse.Namespace) -> int:
    """Measure one preset, rung by rung, in this process; returns how many rungs were wrong."""
    device = choose_device(arguments.device)
    from megalm.layout import Layout
    from megalm.parallel import groups
    from megalm.training.build import choose_attention

    results = Results(arguments.output)
    introduce(device, results, "training")
    groups.start(device)
    joined = groups.create(Layout())
    available = ROOM * (devices.memory(device) or math.inf)
    steps = arguments.warmup + arguments.steps + arguments.profile
    name, changes = fit(arguments.worker, arguments.set, steps, available)
    base = read_config(arguments.worker, *changes, steps=steps)
    taken = choose_attention(base, joined, device)[0].model.attention_backend
    rungs = {
        rung: more
        for rung, more in {"base": [], **ladder(base, taken)}.items()
        if not arguments.rung or any(text in rung for text in arguments.rung)
    }
    print("".join(f"{word:>{width(column)}}" for column, word in enumerate(HEAD)), flush=True)
    reference, slowest, wrong = None, 0.0, 0
    for rung, more in rungs.items():
        started = time.time()
        if started + slowest > arguments.until:
            row: dict[str, Any] = {"skipped": "--minutes are over"}
        else:
            row = {"settings": [*changes, *more]}
            try:
                config = read_config(arguments.worker, *changes, *more, steps=steps)
                row |= try_rung(config, joined, device, arguments, available)
            except MegalmError as error:  # what the config does not go with
                row["refused"] = str(error)
        if "losses" in row:
            alike = config.segmented == base.segmented  # documents that do not see one another have another loss
            if alike and reference is None:
                reference = row["losses"]
            row["loss_difference"] = difference(row["losses"], reference) if alike else None
            if problem := fault(row["losses"], row["loss_difference"]):
                row["wrong"], wrong = problem, wrong + 1
        results.write(model=name, rung=rung, **row)
        show(name, rung, row)
        slowest = max(slowest, time.time() - started)
    groups.destroy()
    return wrong


def fit(preset: str, given: list[str], steps: int, available: float) -> tuple[str, list[str]]:
    """What of a preset is predicted to fit: its name, and what is changed in it. Rows are halved first, for they cost
    the least; then blocks are left out.

    Raises MegalmError if not even a quarter of them fits.
    """
    whole = read_config(preset, *given, steps=steps)
    rows, all_rows = whole.train.micro_batch_size, whole.train.global_batch_size
    choices = [(rows // 2**n, 1.0) for n in range(rows.bit_length())] + [(1, share) for share in (0.75, 0.5, 0.25)]
    for count, share in choices:
        blocks = int(whole.model.num_layers * share)
        changes = [*given, f"train.micro_batch_size={count}", f"model.num_layers={blocks}"]
        changes.append(f"train.global_batch_size={all_rows // count * count}")
        if predict(read_config(preset, *changes, steps=steps)).total <= available:
            return preset if share == 1 else f"{preset}, {blocks} of {whole.model.num_layers} blocks", changes
    raise MegalmError(f"{preset} is predicted to need more than {format_bytes(available)} with one row: take another")


def ladder(base: RunConfig, taken: str) -> dict[str, list[str]]:
    """Rungs by name: what each changes in the base. Each lever of the config at every place but the base's. taken: its
    attention kernel."""
    rows, all_rows = base.train.micro_batch_size, base.train.global_batch_size
    other_rows = [count for count in (rows // 2, rows * 2) if count > 0 and all_rows % count == 0]
    return {
        "norm apex, not compiled": ["model.norm_implementation=apex", "train.compile=false"],
        "not compiled": ["train.compile=false"],
        "fp8": ["train.fp8=true"],
        **{f"attention {name}": [f"model.attention_backend={name}"] for name in BACKENDS if name != taken},
        **{f"recompute {what}": [f"parallel.recompute={what}"] for what in ("selective", "full")},
        "optimizer not fused": ["optimizer.implementation=torch"],
        **{f"{count} rows at a time": [f"train.micro_batch_size={count}"] for count in other_rows},
        "documents isolated": ["data.attend_across_documents=false"],
        # Its memory is not predicted: fewer rows are on the safe side. It is the slowest, so the last.
        "fp32": ["train.precision=fp32", f"train.micro_batch_size={max(1, rows // 4)}"],
    }


def try_rung(
    config: RunConfig, joined: Any, device: torch.device, arguments: argparse.Namespace, available: float
) -> dict[str, Any]:
    """measure(), or the reason why there is nothing to measure, with what was predicted if something is."""
    predicted = None if config.unpredicted() else predict(config)
    found: dict[str, Any] = {
        "predicted_memory": predicted and asdict(predicted),
        "predicted_total": predicted and predicted.total,
    }
    if predicted and predicted.total > available:
        return found | {"refused": f"predicted to need {format_bytes(predicted.total)}, which are not there"}
    try:
        return found | measure(config, joined, device, arguments, predicted)
    except MegalmError as error:  # a kernel that is not here
        return found | {"refused": str(error)}
    except torch.OutOfMemoryError as error:
        return found | {"refused": f"out of memory, which was not predicted: {reason(error)}"}
    finally:
        # torch.compile leaves a function as it is once it met it in too many forms, those of other rungs among them.
        torch.compiler.reset()
        # The engine is a web of cycles: only now is its memory free for the next rung.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    config: RunConfig, joined: Any, device: torch.device, arguments: argparse.Namespace, predicted: Memory | None
) -> dict[str, Any]:
    """Train config.train.steps steps, of which those after the warmup are timed, but for the last if it is profiled."""
    norm = "compiled" if config.compiles(device.type) else resolve_norm(config.model.norm_implementation, device.type)
    laps, losses = Laps(device), []
    on_gpu = device.type == "cuda"
    warmup, timed = arguments.warmup, arguments.warmup + arguments.steps
    profiler = torch.profiler.profile()

    def after_step(loss: float) -> None:
        losses.append(loss)
        if len(losses) == warmup and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        if warmup <= len(losses) <= timed:
            laps.mark()
        if len(losses) == timed and arguments.profile:
            profiler.start()
        if len(losses) > timed:
            profiler.stop()

    attention = train(config, joined, device, after_step=after_step, draw=False)
    seconds = laps.seconds()
    matmul = matmul_rate(device)  # as warm as the device has become
    time_of_step = timing(seconds)
    tokens = config.train.global_batch_size * config.train.sequence_length
    rate = tokens / time_of_step["seconds"]
    done = {name: rate * per_token for name, per_token in config.flops_per_token().items()}
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
    allocated = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return {
        "attention": attention,
        "norm": norm,
        "parameters": config.model.num_parameters(),
        "tokens_per_step": tokens,
        "step_seconds": seconds,
        **time_of_step,
        "tokens_per_second": rate,
        "tflops": done["full"] / 1e12,
        **{f"mfu_{name}": value / peak if peak else None for name, value in done.items()},
        "matmul_tflops": matmul / 1e12,
        "share_of_matmul": done["full"] / matmul,
        "peak_memory": allocated,
        "peak_reserved": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "peak_to_predicted": allocated / predicted.total if allocated and predicted else None,
        "losses": losses,
        **({"profile": by_kernel(profiler)} if arguments.profile else {}),
    }


def by_kernel(profiler: torch.profiler.profile) -> dict[str, Any]:
    """Seconds of the device in each kernel, the most first; `span`: from the first's start to the last's end, and
    `busy`: of it, with one or more at work. Nothing of a CPU, which has no kernels."""
    seconds: dict[str, list[float]] = {}
    times = []
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            seconds.setdefault(event.name(), []).append(event.duration_ns() / 1e9)
            times.append((event.start_ns() / 1e9, event.start_ns() / 1e9 + event.duration_ns() / 1e9))
    busy, until = 0.0, -math.inf
    for start, end in sorted(times):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    kernels = {name: {"seconds": sum(each), "calls": len(each)} for name, each in seconds.items()}
    ordered = dict(sorted(kernels.items(), key=lambda item: -item[1]["seconds"]))
    return {"span": until - min(times)[0] if times else 0.0, "busy": busy, "kernels": ordered}


def difference(losses: list[float], reference: list[float]) -> float:
    """The largest of any step, relative to the reference."""
    return max(abs(found / wanted - 1) for found, wanted in zip(losses, reference, strict=True))


def fault(losses: list[float], off: float | None) -> str:
    """Why a rung does not train the model of the base, from whose losses it is `off`; empty if it does."""
    if not losses[-1] < losses[0]:
        return f"the loss does not fall: {losses}"
    if off is not None and not off < SAME:
        return f"the losses are up to {off:.1%} from the base's, and {SAME:.0%} is allowed: {losses}"
    return ""


def width(column: int) -> int:
    return (24, 26)[column] if column < 2 else 11


def show(name: str, rung: str, row: dict[str, Any]) -> None:
    """A line of the table."""
    words = [name, rung]
    reason = row.get("wrong") or row.get("refused") or row.get("skipped")
    if reason is None:
        shares = [row[key] for key in ("mfu_6n", "mfu_full", "share_of_matmul")]
        words += [f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.3f}", f"{row['spread']:.1%}"]
        words += ["-" if share is None else f"{share:.1%}" for share in shares]
        words += [format_bytes(size) if size else "-" for size in (row["peak_memory"], row["predicted_total"])]
        words.append("-" if row["loss_difference"] is None else f"{row['loss_difference']:.2%}")
    line = "".join(f"{word:>{width(column)}}" for column, word in enumerate(words))
    print(line if reason is None else f"{line}   {reason}", flush=True)
    if profile := row.get("profile"):
        print(f"    of {profile['span']:.3f} s the device was busy for {profile['busy']:.3f} s:")
        for kernel, spent in list(profile["kernels"].items())[:SHOWN]:
            print(f"    {spent['seconds']:>9.4f} s {spent['calls']:>6} x {kernel[:110]}", flush=True)


if __name__ == "__main__":
    main_guard(main)
