"""A whole model: the block's sizes, how many of them, and both ends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from megalm.errors import MegalmError
from megalm.nn.config import BlockConfig


class ModelConfig(BlockConfig):
    """A decoder-only Transformer language model."""

    init_from: str | None = None
    """A Hugging Face folder or a checkpoint whose weights a run starts from, at any layout. Default: random ones."""
    vocab_size: PositiveInt | None = None
    """Number of token ids. Default: the tokenizer's."""
    pad_vocab_to_multiple_of: PositiveInt = 128
    """Rows of the embedding are rounded up to this, whatever the layout; the extra logits are masked out."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    tie_word_embeddings: bool = False
    """The output head shares the embedding's weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    scale_output_init: bool = True
    """Projections into the residual stream start at init_std / sqrt(2 x num_layers) (GPT-2)."""
    z_loss: NonNegativeFloat = Field(0.0)
    """Weight of the squared log-normaliser added to the loss (PaLM, section 5)."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        heads, groups = self.num_attention_heads, self.key_value_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}: "
                "change one of them or set head_dim"
            )
        if heads % groups:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_width}")
        if self.position == "rotary" and (self.rotary_width % 2 or not self.rotary_width):
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction:g} turns {self.rotary_width} of {self.head_width} channels, "
                "which must be an even number: change it"
            )
        if self.sliding_window and self.position == "alibi":
            raise ValueError("sliding_window with alibi positions is not supported: choose one")
        return self

    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to pad_vocab_to_multiple_of."""
        assert self.vocab_size is not None
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    def num_parameters(self) -> int:
        """Weights of the model without the rows that pad the vocabulary; a tied head counts once."""
        assert self.vocab_size is not None
        hidden, inner = self.hidden_size, self.feed_forward_width
        queries = self.num_attention_heads * self.head_width
        keys_values = 2 * self.key_value_heads * self.head_width
        norm = hidden * (2 if self.norm == "layernorm" else 1)
        attention = hidden * (queries + keys_values) + queries * hidden
        attention += (queries + keys_values) * self.attention_bias + hidden * self.attention_output_bias
        attention += 2 * self.head_width * self.qk_norm
        inputs = 2 if self.gated else 1
        feed_forward = (inputs + 1) * hidden * inner + (inputs * inner + hidden) * self.mlp_bias
        tables = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        if self.position == "learned":
            tables += self.max_position_embeddings * hidden
        return tables + self.num_layers * (2 * norm + attention + feed_forward) + norm


def saved_config(saved: Mapping[str, Any], folder: Path, version: str) -> ModelConfig:
    """The model of a checkpoint, with kernels chosen anew: those of the machine that trained it may not be here.

    saved: the section `model` of its config. version: of megalm, that wrote it. Raises MegalmError if this version does
    not know what it holds.
    """
    try:
        return ModelConfig.model_validate({**saved, "attention_backend": "auto", "norm_implementation": "auto"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MegalmError(
            f"checkpoint {folder} holds a model this version of megalm does not know: "
            f"model.{'.'.join(map(str, first['loc']))}: {first['msg']}; use the version that wrote it, {version}"
        ) from None
