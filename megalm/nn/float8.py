"""Matrix products in float8 (Micikevicius et al. 2022), by torchao: the one seam to it.

A layer's input and weight are rounded to e4m3 and the gradient of its output to e5m2, each with one scale, found anew
every time: the power of two that brings its largest number nearest to the end of the format's range. With any other
factor all rounding would depend on which rows share a micro-batch, and the curve on the layout; with this one only that
of numbers far below the largest does (by 2^14 or more, for e4m3), which lose bits. Products come out in the layer's
precision; weights, their gradients and whatever is not a product stay as they are. A GPU sums the forward product in
the tensor cores' own registers, with fewer bits than fp32.
"""

import importlib
import logging
from typing import Any

import torch
from torch import nn

from megalm.errors import MegalmError, reason

KEY = "train.fp8"


def require(device: torch.device) -> None:
    """Raises MegalmError where there is no torchao, or a GPU that does not multiply float8. A CPU computes with the
    rounded numbers in fp32, so that a run can be tried out there."""
    try:
        _torchao()
    except Exception as error:  # built for another torch, it fails in any way it likes
        raise MegalmError(
            f"{KEY} needs torchao, which does not import ({reason(error)}): pip install 'megalm[fp8]', or leave it out"
        ) from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise MegalmError(
            f"{KEY} needs a GPU that multiplies float8 (compute capability 8.9 or newer), and this is a "
            f"{torch.cuda.get_device_name(device)}: leave {KEY} out"
        )


def convert(module: nn.Module, device: torch.device) -> None:
    """Let every linear layer in `module` multiply in float8; its parameters stay the same objects."""
    torchao = _torchao()
    how = torchao.Float8LinearConfig(round_scales_to_power_of_2=True, emulate=device.type == "cpu")
    torchao.convert_to_float8_training(module, config=how)


def _torchao() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it speaks of kernels for other torches and GPUs
    try:
        return importlib.import_module("torchao.float8")
    finally:
        logging.disable(before)
