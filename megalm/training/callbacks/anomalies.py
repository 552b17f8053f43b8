"""What a step with a broken or exploding gradient does: stop, skip, or roll back. Each is counted and written down."""

import json
import math
from pathlib import Path
from typing import Any

from megalm.training.resume import roll_back
from megalm.training.run import ANOMALY, Callback, Run

SKIPPED = "skipped_samples.jsonl"
"""In the run's folder: the samples of every step that was not applied, by their number in the order of training."""
_SMOOTHING = 0.98
_WARMUP = 20


class Anomalies(Callback):
    """Judges the gradient norm before the optimizer moves (`accept`), and acts on the verdict after the step.

    A spike is a norm above train.spike_factor times the running mean of the accepted norms, after 20 of them.
    """

    def __init__(self, on_nan: str, on_spike: str, spike_factor: float, max_anomalies: int):
        self._actions = {"nan": on_nan, "spike": on_spike}
        self._factor = spike_factor
        self._limit = max_anomalies
        self._mean = 0.0
        self._accepted = 0
        self.anomalies = 0
        self.overflows = 0

    def accept(self, norm: float) -> bool:
        """Whether a step of this global gradient norm may be applied. The same on every rank."""
        kind = self._kind(norm)
        if kind and self._actions[kind] != "ignore":
            return False
        if math.isfinite(norm):
            self._accepted += 1
            weight = max(1 - _SMOOTHING, 1 / self._accepted)
            self._mean += weight * (norm - self._mean)
        return True

    def _kind(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return "nan"
        if self._accepted >= _WARMUP and norm > self._factor * self._mean:
            return "spike"
        return None

    def after_step(self, run: Run, record: dict[str, Any]) -> None:
        overflow = record.pop("overflow")
        if not record["applied"]:
            if overflow:  # DeepSpeed looks for the loss scale of fp16
                self.overflows += 1
            else:
                self._act(run, record)
        # Counts stay in every later record: those of steps that were taken back are gone.
        record |= {name: count for name in ("anomalies", "overflows") if (count := getattr(self, name))}

    def _act(self, run: Run, record: dict[str, Any]) -> None:
        # Which was not asked of a norm that is not finite: DeepSpeed does not call the optimizer then.
        kind = "spike" if math.isfinite(record["grad_norm"]) else "nan"
        action = self._actions[kind]
        self.anomalies += 1
        what = (
            f"step {run.step}: loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"
            f" ({'not finite' if kind == 'nan' else f'a spike over the mean of {self._mean:.4g}'})"
        )
        last, taken = run.data_state["samples"], run.config.train.global_batch_size
        if action == "stop" or self.anomalies > self._limit:
            run.stop = ANOMALY
            why = f"train.on_{kind}=stop" if action == "stop" else f"more than train.max_anomalies={self._limit}"
            run.say(f"{what}; stopped before the update ({why}); set train.on_{kind}=skip or rollback to go past it")
            action = "stop"
        elif action == "rollback":
            before = run.step
            step = roll_back(run)
            taken *= before - step
            record["rolled_back"] = True
            run.say(f"{what}; rolled back to step {step}, its samples are passed over ({self.anomalies} so far)")
        else:
            run.say(f"{what}; skipped the update ({self.anomalies} so far)")
        self._write_down(run, record, kind, action, [last - taken, last])

    def _write_down(self, run: Run, record: dict[str, Any], kind: str, action: str, passed_over: list[int]) -> None:
        """Which samples were in the step. passed_over: from where to where the run goes on without having learnt."""
        ids = sorted({number for numbers in run.groups.gather(run.sample_ids) for number in numbers})
        if not run.is_main:
            return
        facts = {"step": record["step"], "why": kind, "action": action}
        norm = {key: value if math.isfinite(value := record[key]) else None for key in ("loss", "grad_norm")}
        run.attempt(_append, run.directory / SKIPPED, facts | norm | {"samples": ids, "passed_over": passed_over})
        run.event("anomaly", **facts, samples=len(ids), passed_over=passed_over)

    def state(self) -> dict[str, Any]:
        return {
            "mean": self._mean,
            "accepted": self._accepted,
            "anomalies": self.anomalies,
            "overflows": self.overflows,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._mean, self._accepted = state["mean"], state["accepted"]
        self.anomalies, self.overflows = state["anomalies"], state["overflows"]


def _append(path: Path, fact: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fact) + "\n")
