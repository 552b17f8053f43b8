"""Records of the run: console, metrics.jsonl, wandb, TensorBoard, and the picture."""

import time
from typing import Any

import torch

from megalm.metrics import flops
from megalm.metrics.config import LoggingConfig
from megalm.metrics.meters import format_bytes, resident_memory
from megalm.metrics.sinks import JsonlSink, Sink, open_sinks
from megalm.training.run import Callback, Run

DRAWING = 0.01
"""Share of a run's time that goes into its picture, at most; the ranks wait for the one that draws."""


class Metrics(Callback):
    """Completes the record with rates and memory, and writes it every logging.every steps, on one rank.

    A record that says something rare (an evaluation, a step not applied) is written whatever the step; that of a
    step that was rolled back is not, since the step comes again. A full disk costs the picture, not the run, and no
    record if there is room again before the end.
    """

    def __init__(self, config: LoggingConfig, device: torch.device, predicted: int | None = None):
        """predicted: bytes at the peak of a step, where training/memory.py knows them."""
        self._predicted = predicted
        self._config = config
        self._device = device
        self._sinks: list[Sink] = []
        self._seconds = 0.0
        self._tokens = 0
        self._written = False
        self._next_drawing = time.monotonic() + 0.5 / DRAWING  # the first one takes about half a second

    def on_start(self, run: Run) -> None:
        if not run.is_main:
            return
        width = max(map(len, run.facts))
        for name, fact in run.facts.items():
            run.say(f"{name:{width}}  {fact}")
        start = f"continuing from step {run.step}" if run.step else "starting at step 0"
        run.say(f"{start} of {run.config.train.steps}, in {run.directory}")
        self._tokens = run.tokens
        self._sinks = open_sinks(
            self._config,
            run.directory,
            total_steps=run.config.train.steps,
            resumed_step=run.step,
            run_config=run.config.model_dump(),
        )

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        self._seconds += record.pop("seconds")
        if record.get("rolled_back"):
            self._seconds, self._tokens = 0.0, run.tokens
            for sink in self._sinks:
                run.attempt(sink.rewind, run.step)
            return
        evaluated = "held_out" in record or "scores" in record
        rare = evaluated or not record["applied"] or run.stop is not None
        if not run.is_main or not (rare or run.due(self._config.every)):
            return
        rate = (run.tokens - self._tokens) / self._seconds
        record |= {"tokens_per_second": rate, "memory": self._memory(), "time": time.time()}
        if self._device.type == "cuda":
            record |= self._utilisation(run, rate)
        if run.failed_saves:
            record["failed_saves"] = run.failed_saves
        for sink in self._sinks:
            written = run.attempt(sink.write, record)
            self._written |= written and isinstance(sink, JsonlSink)
        self._seconds, self._tokens = 0.0, run.tokens
        if evaluated and self._written and time.monotonic() >= self._next_drawing:
            run.attempt(self._draw, run)

    def on_end(self, run: Run) -> None:
        if self._sinks:
            for sink in self._sinks:
                run.attempt(sink.close)
            if self._written and run.attempt(self._draw, run):
                run.say(f"curve: {run.directory / 'loss.png'}")
            if self._predicted:
                peak = format_bytes(self._memory())
                run.say(f"memory: {peak} at the peak, {format_bytes(self._predicted)} were predicted of a step")

    def _draw(self, run: Run) -> None:
        from megalm.metrics.plot import plot_runs  # matplotlib is a fifth of what a run imports, on every rank

        started = time.monotonic()
        plot_runs([run.directory], run.directory / "loss.png")
        self._next_drawing = time.monotonic() + (time.monotonic() - started) / DRAWING

    def _utilisation(self, run: Run, rate: float) -> dict[str, float]:
        """TFLOP/s per GPU and MFU by both conventions: full attention (PaLM), and attention halved for causality."""
        ranks, peak = run.plan.layout.world_size, flops.peak_flops(torch.cuda.get_device_name(self._device))
        needed, record = run.config.flops_per_token(), {}
        for suffix, convention in (("", "full"), ("_causal", "causal")):
            per_token = needed[convention]
            record[f"tflops{suffix}"] = rate * per_token / ranks / 1e12
            if peak:
                record[f"mfu{suffix}"] = flops.mfu(rate, per_token, peak, ranks)
        return record

    def _memory(self) -> int:
        """Peak bytes on the GPU, or this process's resident bytes."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else resident_memory()
