"""Where the records of a run go. Only one rank has sinks.

A record is a dict with `step` and nested ones (held_out, scores, ...); metrics/records.py names the keys.
"""

import os
import sys
import uuid
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from tqdm import tqdm

from megalm.errors import MegalmError
from megalm.metrics.config import LoggingConfig, WandbConfig
from megalm.metrics.meters import Rate, format_bytes, format_count, format_duration
from megalm.metrics.records import Record, read_records, write_record


class Sink(Protocol):
    """Takes records in the order of their steps; a step that comes again (after a rollback) replaces what it passed."""

    def write(self, record: Record) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget what was written of later steps, as far as that can be."""

    def close(self) -> None: ...


def open_sinks(
    config: LoggingConfig, directory: Path, *, total_steps: int, resumed_step: int, run_config: dict[str, Any]
) -> list[Sink]:
    """All sinks that `config` asks for, for a run in folder `directory` that continues after `resumed_step` (0: new).

    run_config is shown by wandb. Raises MegalmError for a sink whose package is missing, before any file is touched.
    """
    sinks: list[Sink] = []
    if config.wandb.mode != "off":
        sinks.append(WandbSink(config.wandb, directory, run_config))
    if config.tensorboard:
        sinks.append(TensorboardSink(directory / "tensorboard", resumed_step))
    sinks.append(JsonlSink(directory / "metrics.jsonl", resumed_step))
    sinks.append(ConsoleSink(total_steps, resumed_step, progress_bar=config.progress_bar))
    return sinks


class JsonlSink:
    """metrics.jsonl, the one true curve of a run.

    Records after resumed_step (of steps that were not saved) and a line cut short by a crash are taken out at the
    start. Each record is on its way to the disk when `write` returns; what a full disk did not take, a rewind too,
    follows with the next one.
    """

    def __init__(self, path: Path, resumed_step: int = 0):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._last = 0
        self._waiting: list[tuple[int, int, bytes]] = []
        """(last step to keep, last step there is then, what is left of the line to add)"""
        self._file: BinaryIO | None = None
        self._rewind(resumed_step)

    def write(self, record: Record) -> None:
        """Raises OSError if the disk does not take it now."""
        self._waiting.append((record["step"] - 1, record["step"], (write_record(record) + "\n").encode()))
        self._flush()

    def rewind(self, step: int) -> None:
        """Raises OSError if the disk does not take it now."""
        self._waiting.append((step, step, b""))
        self._flush()

    def close(self) -> None:
        """Raises OSError if the disk does not take what is left."""
        assert self._file
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        while self._waiting:
            kept, last, line = self._waiting[0]
            if kept < self._last:
                self._rewind(kept)
            assert self._file
            while line:
                line = line[self._file.write(line) :]
                self._waiting[0] = kept, last, line
            self._last = last
            del self._waiting[0]

    def _rewind(self, step: int) -> None:
        """Keep the records up to `step`; a crash on the way leaves the old file or the new one."""
        kept = [r for r in read_records(self._path) if r["step"] <= step] if self._path.exists() else []
        new = self._path.with_name(self._path.name + ".new")
        new.write_text("".join(write_record(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(new, self._path)
        if self._file:
            self._file.close()
        self._file = self._path.open("ab", buffering=0)
        self._last = kept[-1]["step"] if kept else 0


class ConsoleSink:
    """A progress bar on a terminal, aligned lines elsewhere."""

    def __init__(
        self, total_steps: int, resumed_step: int = 0, *, progress_bar: str = "auto", stream: TextIO | None = None
    ):
        """progress_bar: "on", "off", or "auto", which asks whether `stream` (default: stdout) is a terminal."""
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._last = resumed_step
        self._steps = Rate()
        self._bar = None
        if progress_bar == "on" or (progress_bar == "auto" and self._stream.isatty()):
            self._bar = tqdm(
                total=total_steps,
                initial=resumed_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}  {postfix}",
            )

    def write(self, record: Record) -> None:
        done, self._last = record["step"] - self._last, record["step"]
        self._steps.add(max(done, 0))
        line = "  ".join(self._fields(record))
        bits = record.get("bits_per_byte") or {}
        held_out = "  ".join(
            f"{name} {loss:.4f}" + (f" ({bits[name]:.4f} bits per byte)" if name in bits else "")
            for name, loss in (record.get("held_out") or {}).items()
        )
        if self._bar is None:
            width = len(str(self._total))
            self.say(f"step {self._last:>{width}}/{self._total}  {line}")
        else:
            self._bar.n = self._last
            self._bar.set_postfix_str(line)
        if held_out:
            self.say(f"step {self._last} held-out loss  {held_out}")
        for corpus, scores in (record.get("scores") or {}).items():
            said = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.say(f"step {self._last} scores of {corpus}  {said}")

    def rewind(self, step: int) -> None:
        """What was said stays."""

    def say(self, text: str) -> None:
        """Print one line; a bar stays below it."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _fields(self, record: Record) -> list[str]:
        """Of one width from step to step, so that lines align."""
        fields = []
        if "loss" in record:
            fields.append(f"loss {record['loss']:7.4f}")
        if "lr" in record:
            fields.append(f"lr {record['lr']:.2e}")
        if "grad_norm" in record:
            fields.append(f"grad {record['grad_norm']:6.2f}")
        if "tokens_per_second" in record:
            fields.append(f"{format_count(record['tokens_per_second']):>5} tok/s")
        if record.get("mfu") is not None:
            fields.append(f"MFU {record['mfu']:5.1%}")
        if "memory" in record:
            fields.append(f"{format_bytes(record['memory']):>9}")
        rate = self._steps.per_second()
        fields.append(f"ETA {format_duration((self._total - self._last) / rate if rate > 0 else float('nan')):>7}")
        return fields


class WandbSink:
    """Weights & Biases. The run's id is kept in the run folder, so that a resumed run continues its own page.

    Steps that a run takes again, resumed or rolled back, are drawn again: wandb cannot take records back.
    """

    def __init__(self, config: WandbConfig, directory: Path, run_config: dict[str, Any]):
        """Raises MegalmError when the package is missing, or when wandb does not open the run."""
        try:
            import wandb
        except ImportError as error:
            raise MegalmError(
                f"logging.wandb.mode is {config.mode}, but the package wandb is not installed: "
                "pip install 'megalm[wandb]', or set logging.wandb.mode to off"
            ) from error
        directory.mkdir(parents=True, exist_ok=True)
        id_file = directory / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n")
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or directory.resolve().name,
                entity=config.entity,
                id=id_file.read_text().strip(),
                # offline, `wandb sync` joins the parts by their id
                resume="allow" if config.mode == "online" else None,
                mode=config.mode,  # type: ignore[arg-type]
                dir=directory,
                config=run_config,
            )
        except wandb.errors.Error as error:
            raise MegalmError(
                f"logging.wandb.mode is {config.mode}, but wandb does not open the run ({error}): run wandb login, or "
                "set logging.wandb.mode to offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log(flatten(record))

    def rewind(self, step: int) -> None:
        """Nothing can be taken back."""

    def close(self) -> None:
        self._run.finish()


class TensorboardSink:
    """TensorBoard event files. Steps after resumed_step are hidden from an earlier part of the run."""

    def __init__(self, directory: Path, resumed_step: int = 0):
        """Raises MegalmError when the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MegalmError(
                "logging.tensorboard is true, but the package tensorboard is not installed: "
                "pip install 'megalm[tensorboard]', or set logging.tensorboard to false"
            ) from error
        # also in a run at its start, whose folder may hold steps from before its first checkpoint
        self._open = lambda step: SummaryWriter(str(directory), purge_step=step + 1)
        self._writer = self._open(resumed_step)

    def write(self, record: Record) -> None:
        for key, value in flatten(record).items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["step"])

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        self._writer.close()


def flatten(record: Record) -> Record:
    """{"scores": {"web": {"f1": 0.9}}} becomes {"scores/web/f1": 0.9}."""
    flat: Record = {}
    for key, value in record.items():
        inner = {f"{key}/{name}": item for name, item in flatten(value).items()} if isinstance(value, dict) else None
        flat.update({key: value} if inner is None else inner)
    return flat
