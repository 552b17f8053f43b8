"""When checkpoints are written and kept, and what a resumed run may change."""

from pydantic import Field, NonNegativeInt, field_validator

from megalm.config import Config

CHANGEABLE = {
    "train.global_batch_size": "the samples go on with the next one, or start anew if rows are sorted",
    "train.sequence_length": "the samples start anew from the first",
    "train.precision": "weights and moments, which are kept in fp32, stay",
    "train.fp8": "weights and moments, which are kept in fp32, stay",
    "run.seed": "the samples start anew from the first, in another order",
    "data.sources": "the samples start anew from the first of the new blend",
    "data.shuffle": "the samples start anew from the first",
    "data.attend_across_documents": "the samples are masked otherwise from the next one on",
    "model.hidden_dropout": "other shares are dropped",
    "model.attention_dropout": "other shares are dropped",
    "model.z_loss": "the loss has another term",
    "model.max_position_embeddings": "dropout draws others; not with learned positions, whose table must keep its rows",
    "model.rope_theta": "positions are encoded otherwise",
    "model.rope_scaling": "positions are encoded otherwise",
    "model.sliding_window": "tokens see other tokens",
    "deepspeed": "DeepSpeed does what it then says",
}
"""Keys whose change makes another run of it, and what then happens. Others cannot change, or may at any time."""


class CheckpointConfig(Config):
    """Folders RUN/checkpoints/step-N."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints; the last step always writes one. 0: only the last."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory that is kept (12 bytes a parameter, spread over the
    ranks); false waits for each to be written."""
    keep_last: NonNegativeInt = 0
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: NonNegativeInt = 0
    """Also keep, for good, those at multiples of this many steps; 0 keeps none but keep_last."""
    resume: str = "auto"
    """`auto` continues the run in its folder, `never` refuses a folder that holds one, or a checkpoint folder."""
    allow_changes: list[str] = Field(default_factory=list)
    """Keys that a resumed run may change although they make another run of it, such as [train.global_batch_size,
    data.sources]. The layout (parallel, micro_batch_size), schedule and optimizer may always change."""

    @field_validator("allow_changes")
    @classmethod
    def _known(cls, keys: list[str]) -> list[str]:
        if unknown := sorted(set(keys) - set(CHANGEABLE)):
            raise ValueError(f"{unknown[0]} cannot be allowed to change: choose from {', '.join(CHANGEABLE)}")
        return keys
