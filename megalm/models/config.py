"""A whole model: the block's sizes, how many of them, both ends; and what of it is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from megalm.config import Config
from megalm.errors import MegalmError
from megalm.nn.config import BlockConfig, HeadKind


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
    """The output head of a language model shares the embedding's weight."""
    head: HeadKind = "language_model"
    """What stands on the last block: logits of the next token, or of classes at the positions that a task reads.
    Default: what the task needs."""
    num_labels: PositiveInt | None = None
    """Classes of a head that is not a language model's. Default: the task's."""
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
        if self.z_loss and self.head != "language_model":
            raise ValueError(f"z_loss is of a language model, and the head is {self.head}: set z_loss to 0")
        if self.sliding_window and self.position == "alibi":
            raise ValueError("sliding_window with alibi positions is not supported: choose one")
        return self

    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to pad_vocab_to_multiple_of."""
        assert self.vocab_size is not None
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding's table."""
        return self.tie_word_embeddings and self.head == "language_model"

    @property
    def vocabulary_tables(self) -> int:
        """Tables with a row per token id: the embedding, and the head of its own that a language model may have."""
        return 2 if self.head == "language_model" and not self.tie_word_embeddings else 1

    @property
    def head_bias(self) -> bool:
        """Whether the classes of a head that is not a language model's have biases, as in transformers."""
        return self.head in ("token_classification", "question_answering")

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
        tables = self.vocab_size * hidden * self.vocabulary_tables
        if self.head != "language_model":
            assert self.num_labels is not None
            tables += self.num_labels * (hidden + self.head_bias)
        if self.position == "learned":
            tables += self.max_position_embeddings * hidden
        return tables + self.num_layers * (2 * norm + attention + feed_forward) + norm


class TuningConfig(Config):
    """What of the model is trained, and how fast each part of it."""

    method: Literal["full", "lora", "dora"] = "full"
    """`full` trains the weights themselves; `lora` (Hu et al. 2021) and `dora` (Liu et al. 2024) freeze them and train
    low-rank adapters beside projections, and a task's head."""
    rank: PositiveInt = 8
    """lora, dora: rank of an adapter."""
    alpha: PositiveFloat = 16.0
    """lora, dora: adapters are scaled by alpha / rank."""
    targets: list[str] = ["*.attention.*", "*.feed_forward.*"]
    """lora, dora: patterns of the projections that get an adapter; each matches a full name
    (`blocks.3.attention.query`) or the end of one (`query`)."""
    also_train: list[str] = []
    """lora, dora: patterns of full parameter names that are trained beside the adapters, such as `*norm*`."""
    freeze: list[str] = []
    """Patterns of full parameter names that are not trained, such as `embedding.*` or `blocks.[0-3].*`."""
    layer_decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Layer-wise decay of the learning rate: the head and the last norm have the full one, each block below this share
    of the one above it, embeddings the lowest (Clark et al. 2020, ELECTRA)."""
    body_rate: PositiveFloat = 1.0
    """Learning rate of all but a task's head, as a share of the head's."""
    head_first_steps: NonNegativeInt = 0
    """First steps in which only a task's head moves; what is below it has gradients of zero and stays."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Noise on embeddings in training, uniform within ± this / sqrt(sequence_length x hidden_size) (NEFTune, Jain et
    al. 2023)."""

    @property
    def adapts(self) -> bool:
        """Whether there are adapters."""
        return self.method != "full"

    @model_validator(mode="after")
    def _consistent(self) -> "TuningConfig":
        if self.also_train and not self.adapts:
            raise ValueError("also_train needs method lora or dora: full trains all that freeze does not name")
        if self.adapts and not self.targets:
            raise ValueError(f"targets is empty and method is {self.method}: name a projection, such as query")
        return self


def saved_config(saved: Mapping[str, Any], folder: Path, version: str) -> tuple[ModelConfig, TuningConfig]:
    """The model of a checkpoint, with kernels chosen anew (those of the machine that trained it may not be here), and
    what of it was trained, which says where it has adapters.

    saved: its config. version: of megalm, that wrote it. Raises MegalmError if this version does not know what it
    holds.
    """
    model = {**saved["model"], "attention_backend": "auto", "norm_implementation": "auto"}
    section = "model"
    try:
        config = ModelConfig.model_validate(model)
        section = "tuning"
        return config, TuningConfig.model_validate(saved.get("tuning", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MegalmError(
            f"checkpoint {folder} holds a model this version of megalm does not know: "
            f"{section}.{'.'.join(map(str, first['loc']))}: {first['msg']}; use the version that wrote it, {version}"
        ) from None
