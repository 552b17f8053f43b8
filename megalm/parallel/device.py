"""CPU or CUDA: the only file that tells them apart for the engines below."""

import logging
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megalm.errors import MegalmError, reason

Kind = Literal["cpu", "cuda"]


def choose(wanted: Literal["auto", "cpu", "cuda"]) -> Kind:
    """The device type to train on; must be called before deepspeed or megatron-core is imported.

    Raises MegalmError if `cuda` is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MegalmError("run.device is cuda and torch finds no CUDA device here: set it to cpu, or mend the driver")
    device: Kind = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # DeepSpeed picks its accelerator from this variable at import.
        os.environ["DS_ACCELERATOR"] = "cpu"
        # megatron-core asks for the current CUDA device wherever it allocates; this one answer makes its layers,
        # mappings and losses run on the CPU unchanged.
        torch.cuda.current_device = _cpu  # type: ignore[assignment]
    # What the libraries say, at import and in every step, of packages and names that are their own affair. The
    # broadcasts are a pipeline's exchange of activations, which DeepSpeed differentiates itself.
    warnings.filterwarnings("ignore", message="c10d::broadcast_")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return device


def _cpu() -> torch.device:
    """One function however often a device is chosen: torch.compile knows it by its identity."""
    return torch.device("cpu")


class Stopwatch:
    """Seconds that this device works between `with` and its end. A GPU is not waited for until they are asked for."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[Any, Any]] = []
        self._started: Any = None

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *exception: object) -> None:
        self._laps.append((self._started, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """The sum since it was last taken."""
        laps, self._laps = self._laps, []
        if not self._cuda:
            return float(sum(end - start for start, end in laps))
        if laps:
            laps[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in laps)) / 1000


def send(x: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on the device. A GPU copies it when its turn comes, which no one waits for."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def fetch(x: Tensor) -> Callable[[], float]:
    """A number of the device, to be asked for later: whoever asks waits for what the device was given before this call,
    and not for what it was given since."""
    if not x.is_cuda:
        return x.item
    here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def number() -> float:
        copied.synchronize()
        return here.item()

    return number


def require_precision(precision: str) -> None:
    """Raises MegalmError for arithmetic that this device lacks."""
    from deepspeed.accelerator import get_accelerator  # reads what choose() has set

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise MegalmError(
            f"train.precision fp16 is not supported on this {get_accelerator().device_name()}: use bf16 or fp32"
        )


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it; True where that cannot be read (Linux tells)."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", told))


def require_determinism() -> None:
    """From here on torch takes only kernels that give the same bits in every run, and refuses those without one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    # That is to find faults with: nobody reads what has not been written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot build for this device, and the way out; None if it can. Before hours of loading, not
    after."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever its compilers say
        return f"{reason(error)}: install {'g++' if device.type == 'cpu' else 'Triton and a C compiler'}"
    return None


def forget(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory for tensors that are gone, and begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def local(device: Kind) -> torch.device:
    """This rank's device, made current."""
    if "OMP_NUM_THREADS" not in os.environ:
        # DeepSpeed's and torchrun's name for the ranks of this machine; ranks that fight for cores crawl.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks))
    if device == "cpu":
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise MegalmError(
            f"this machine has {count} CUDA devices and more ranks were started on it: start {count}, or set "
            "run.device to cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
