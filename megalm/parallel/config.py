"""How the run is spread over ranks. The data-parallel degree is what is left of the number of ranks."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from megalm.config import Config
from megalm.nn.config import Recompute


class ParallelConfig(Config):
    """Degrees of each axis, and what is sharded along the data axis."""

    tensor: PositiveInt = 1
    """Ranks that share each weight matrix (megatron-core's layers)."""
    sequence_parallel: bool = False
    """Also share, between those ranks, the tokens of norms, dropout and residuals."""
    pipeline: PositiveInt = 1
    """Stages the layers are cut into."""
    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """Order of forward and backward passes in a pipeline. `dualpipev` folds two half-pipelines into a V."""
    context: PositiveInt = 1
    """Ranks that share one sequence. Only 1 is supported so far."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is sharded over data-parallel ranks (1 optimizer, 2 and gradients, 3 and weights)."""
    offload_optimizer: bool = False
    """Keep optimizer states and the update on the host (ZeRO 1 to 3)."""
    recompute: Literal[Recompute, "auto"] = "none"
    """Activations recomputed in the backward pass: none, attention's inside, or whole blocks. `auto` takes the least of
    these with which a step is predicted to fit into the GPUs' memory, for which it needs bf16, zero 1, tensor 1 and
    pipeline 1; on a CPU, none."""
    allow_unproved: bool = False
    """Run what no test has proved equal to one process (docs/support.md), and say so in the log."""

    @model_validator(mode="after")
    def _supported(self) -> "ParallelConfig":
        if self.context > 1:
            raise ValueError(f"context {self.context} is not supported yet: set context to 1 and raise tensor instead")
        if self.pipeline > 1 and self.zero > 1:
            raise ValueError(
                f"zero {self.zero} with pipeline {self.pipeline} is not supported (each micro-batch would reduce "
                "its gradients anew): set zero to 1, or pipeline to 1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1: raise tensor or set sequence_parallel to false")
        if self.pipeline_schedule == "dualpipev" and self.pipeline == 1:
            raise ValueError("pipeline_schedule dualpipev needs pipeline > 1: raise pipeline or use 1f1b")
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer needs zero 1, 2 or 3: raise zero or turn it off")
        return self
