"""The training loop. Whatever is not the loop is a callback."""

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from megalm.data.batch import Batch
from megalm.optim.schedule import learning_rate
from megalm.parallel.engine import MicroBatch
from megalm.training.run import DONE, Run


def tensors(batch: Batch) -> MicroBatch:
    """A loader's arrays as the engine's micro-batch; copied only where batches share them (and they are read-only)."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    inputs = tensor(batch.tokens), tensor(batch.segment_ids), tensor(batch.positions), tensor(batch.sample_ids)
    return inputs, (tensor(batch.labels), tensor(batch.loss_mask))


def train(run: Run) -> int:
    """Train until the last step or until a callback sets run.stop. Returns the exit code."""
    config = run.config
    try:
        for callback in run.callbacks:
            callback.on_start(run)
        while run.stop is None and not run.is_last_step:
            started = time.perf_counter()
            run.whereabouts.step = run.step
            run.whereabouts.note("data loading")
            batches, run.data_state = next(run.loader)
            loaded = time.perf_counter()
            run.sample_ids = [int(number) for batch in batches for number in batch.sample_ids]
            rate = learning_rate(run.step, config.schedule, config.optimizer.learning_rate, config.train.steps)
            head_only = run.step < config.tuning.head_first_steps
            result = run.engine.step([tensors(batch) for batch in batches], rate, head_only)
            run.step += 1
            run.tokens += result.trained_tokens
            record: dict[str, Any] = {
                "step": run.step,
                "loss": result.loss,
                "lr": rate,
                "grad_norm": result.grad_norm,
                "tokens": run.tokens,
                "samples": run.data_state["samples"],
                "applied": result.applied,
                "overflow": result.overflow,
                "seconds": time.perf_counter() - started,
                "own_seconds": loaded - started + run.engine.own_seconds(),
            }
            run.whereabouts.step = run.step
            for callback in run.callbacks:
                run.whereabouts.note(type(callback).__name__.lower())
                callback.after_step(run, record)
    finally:
        run.whereabouts.note("end of the run")
        with ExitStack() as ends:  # runs all of them; what was raised above stays the reason
            # Last in, first out: the checkpoint under way is waited for while signals are still only noted.
            ends.callback(run.loader.close)
            for callback in run.callbacks:
                ends.callback(callback.on_end, run)
    # A launcher ends everybody as soon as one rank is gone: none goes before the last has drawn and written.
    run.groups.barrier()
    return DONE if run.stop is None else run.stop
