"""When checkpoints are written and kept."""

from pydantic import NonNegativeInt

from megalm.config import Config


class CheckpointConfig(Config):
    """Folders RUN/checkpoints/step-N."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints; the last step always writes one. 0: only the last."""
    keep_last: NonNegativeInt = 0
    """Newest checkpoints kept; 0 keeps all."""
    resume: str = "auto"
    """`auto` continues the run in its folder, `never` refuses a folder that holds one, or a checkpoint folder."""
