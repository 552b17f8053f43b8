"""Imported once by the server that ranks are forked from."""

import os
import sys

sys.path.insert(0, os.getcwd())

from megalm.parallel import device

device.choose("cpu")

import deepspeed  # noqa: E402, F401
import megatron.core.tensor_parallel  # noqa: E402, F401
