"""What a Transformer block is made of. Sizes follow Hugging Face's names where it has one."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megalm.config import Config

AttentionBackend = Literal[
    "auto", "plain", "blocks", "sdpa", "sdpa_varlen", "sdpa_flash", "sdpa_cudnn", "flash2", "flash3", "flash4"
]

Recompute = Literal["none", "selective", "full"]
"""Activations computed again in the backward pass: none, attention's inside, or the whole block's."""

HeadKind = Literal["language_model", "sequence_classification", "token_classification", "question_answering"]


class RopeScaling(Config):
    """How rotary frequencies are stretched beyond the length the model was trained at."""

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` divides positions; `llama3` and `yarn` treat low and high frequencies apart."""
    factor: PositiveFloat
    """New length over the original one."""
    original_max_position_embeddings: PositiveInt = 8192
    """Length the frequencies were first trained at (llama3, yarn)."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original length / this are fully scaled."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original length / this are left alone."""
    beta_fast: PositiveFloat = 32.0
    """yarn: rotations over the original length above which a frequency is left alone."""
    beta_slow: PositiveFloat = 1.0
    """yarn: rotations over the original length below which a frequency is fully scaled."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be below high_freq_factor {self.high_freq_factor:g}"
            )
        if self.kind == "yarn" and self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow:g} must be below beta_fast {self.beta_fast:g}")
        return self


class BlockConfig(Config):
    """One pre-norm Transformer block."""

    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads: fewer than query heads is grouped-query attention, 1 is multi-query. Default: as many."""
    head_dim: PositiveInt | None = None
    """Width of one head. Default: hidden_size / num_attention_heads."""
    intermediate_size: PositiveInt | None = None
    """Width inside the feed-forward layer. Default: 4 x hidden_size, or 8/3 of it rounded up to 64 when gated."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """Feed-forward non-linearity; the `glu` ones are gated (Shazeer 2020)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward layer and at the end."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance."""
    norm_implementation: Literal["auto", "torch", "apex"] = "auto"
    """`auto` takes NVIDIA apex's fused kernels on a GPU where they pass their self-check, torch otherwise."""
    position: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = "rotary"
    """How positions enter."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence; rows of the learned or sinusoidal table."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies."""
    rotary_fraction: float = Field(1.0, gt=0.0, le=1.0)
    """Share of every head's channels that rotary positions turn, the first ones (GPT-NeoX: 0.25)."""
    qk_norm: bool = False
    """RMSNorm of every query and key head (Qwen3)."""
    sliding_window: PositiveInt | None = None
    """A token sees itself and this many minus one before it. Default: all before it."""
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on attention's output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward layer."""
    parallel_residual: bool = False
    """The feed-forward layer reads the block's input, as attention does, instead of attention's result (GPT-NeoX)."""
    hidden_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropped share of the embeddings and of each sub-layer's output."""
    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropped share of attention weights (takes the plain backend)."""
    attention_backend: AttentionBackend = "auto"
    """Kernel for attention in training; of those that are installed and pass their self-check, `auto` measures which is
    the fastest for the run's shape on a GPU, and a run that goes on keeps it."""

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def feed_forward_width(self) -> int:
        if self.intermediate_size:
            return self.intermediate_size
        return -(-self.hidden_size * 8 // 3 // 64) * 64 if self.gated else 4 * self.hidden_size
