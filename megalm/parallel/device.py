"""CPU or CUDA: the only file that tells them apart for the engines below."""

import os
from typing import Literal

import torch


def choose(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device type to train on; must be called before deepspeed or megatron-core is imported."""
    device: Literal["cpu", "cuda"] = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # DeepSpeed picks its accelerator from this variable at import.
        os.environ["DS_ACCELERATOR"] = "cpu"
        # megatron-core asks for the current CUDA device wherever it allocates; this one answer makes its layers,
        # mappings and losses run on the CPU unchanged.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    return device


def local(device: Literal["cpu", "cuda"]) -> torch.device:
    """This rank's device, made current."""
    if device == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
