"""What a run reports, where and how often."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from megalm.config import Config


class WandbConfig(Config):
    """Weights & Biases."""

    mode: Literal["off", "online", "offline"] = "off"
    """`offline` writes to the run folder, for `wandb sync` later."""
    project: str = "megalm"
    """Project name."""
    name: str | None = None
    """Run name. Default: the run folder's."""
    entity: str | None = None
    """Team or user."""


class LoggingConfig(Config):
    """Console, metrics.jsonl, wandb and TensorBoard."""

    every: PositiveInt = 1
    """Steps between two records in metrics.jsonl and on the console."""
    progress_bar: Literal["auto", "on", "off"] = "auto"
    """`auto` draws a bar on a terminal and prints lines elsewhere."""
    tensorboard: bool = False
    """Write RUN/tensorboard."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    stragglers_every: NonNegativeInt = 100
    """Steps between comparisons of the ranks' own work, which name a slow one; the last step compares too. 0: never."""
    garbage_collection_every: NonNegativeInt = 100
    """Steps between Python garbage collections, so that ranks pause together; 0 leaves Python's own."""
