"""Imported once by the server that ranks are forked from."""

import gc
import os
import sys

sys.path.insert(0, os.getcwd())

from megalm.parallel import device

device.choose("cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  DeepSpeed imports it with its first optimizer
import deepspeed.runtime.zero.stage3  # noqa: E402, F401
import megatron.core.tensor_parallel  # noqa: E402, F401

import megalm.metrics.plot  # noqa: E402, F401  rank 0 draws
import megalm.parallel.tensor  # noqa: E402, F401
import megalm.training.build  # noqa: E402, F401

# Ranks collect garbage, DeepSpeed's ZeRO 3 too, and need not go through all that is imported each time.
gc.collect()
gc.freeze()
