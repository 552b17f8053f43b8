"""The optimizer and the learning rate's course."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megalm.config import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019)."""

    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms, biases and other vectors are left alone."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    implementation: Literal["auto", "torch", "torch_fused", "deepspeed", "apex"] = "auto"
    """AdamW's kernel. `auto` on a GPU takes NVIDIA apex's or DeepSpeed's where they build, else torch's fused one."""


class ScheduleConfig(Config):
    """Learning rate as a function of the step."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Course after warm-up. `wsd`: constant, then a linear decay over the last decay_steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear growth: the first takes 1 / warmup_steps of the peak, the last the peak."""
    total_steps: PositiveInt | None = None
    """Step at which the lowest rate is reached; it stays there. Default: train.steps."""
    decay_steps: NonNegativeInt | None = None
    """wsd: steps of the final decay. Default: a tenth of total_steps."""
    min_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Lowest rate, as a share of the peak (constant: not used; inverse_sqrt: a floor)."""

    @model_validator(mode="after")
    def _consistent(self) -> "ScheduleConfig":
        if self.kind == "inverse_sqrt" and self.warmup_steps == 0:
            raise ValueError("kind inverse_sqrt falls as sqrt(warmup_steps / step): set warmup_steps above 0")
        if self.kind != "wsd" and self.decay_steps is not None:
            raise ValueError(f"decay_steps is of kind wsd, and kind is {self.kind}: set kind to wsd, or leave it out")
        if self.total_steps is not None:
            self.fit(self.total_steps, "total_steps")
        return self

    def fit(self, steps: int, name: str) -> None:
        """Raise ValueError when warm-up and decay do not fit in `steps`, the value of the key `name`."""
        decay = self.decay_steps or 0 if self.kind == "wsd" else 0
        if self.warmup_steps + decay > steps:
            parts = f"warmup_steps {self.warmup_steps}" + (f" + decay_steps {decay}" if decay else "")
            raise ValueError(f"{parts} is more than {name} {steps}: lower the former or raise the latter")
