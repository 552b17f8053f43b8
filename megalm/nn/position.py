"""How positions enter: rotary angles, a learned or sinusoidal table, or ALiBi's slopes.

Nothing here is a buffer: angles are computed in fp32 from positions, so casting a model to bf16 cannot damage them.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megalm.nn.config import BlockConfig, RopeScaling
from megalm.nn.dropout import Dropout, token_rows
from megalm.nn.init import Spec, declare
from megalm.nn.layers import Layers


@cache
@torch.inference_mode(False)  # what evaluation left in the cache must serve training
def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians per position of every pair of channels: [head_dim / 2], fp32 (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies.to(device)
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        keep = torch.zeros_like(frequencies)
    elif scaling.kind == "llama3":
        # Llama 3.1: between two wavelengths, the share that is kept grows linearly with the number of rotations
        rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
    else:
        # YaRN (Peng et al. 2023, section 3.2): the ramp runs over channel pairs between two numbers of rotations
        def pair(rotations: float) -> float:
            wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(theta))

        low = max(math.floor(pair(scaling.beta_fast)), 0)
        high = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
        pairs = torch.arange(head_dim // 2, dtype=torch.float32)
        keep = 1 - ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (keep * frequencies + (1 - keep) * stretched).to(device)


def rotary_attention_factor(scaling: RopeScaling | None) -> float:
    """What queries and keys are multiplied by: YaRN sharpens attention over long contexts (section 3.4)."""
    if scaling is None or scaling.kind != "yarn" or scaling.factor <= 1:
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0


@cache
@torch.inference_mode(False)
def rotary_tables(
    length: int, head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """rotary_angles() of the first `length` positions: two [length, head_dim / 2]."""
    cos, sin = rotary_angles(torch.arange(length, device=device)[None], head_dim, theta, scaling)
    return cos[0, :, 0], sin[0, :, 0]


def rotary_angles(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: positions [batch, seq] -> two [batch, seq, 1, head_dim / 2], fp32."""
    angles = positions[:, :, None, None].float() * rotary_frequencies(head_dim, theta, scaling, positions.device)
    cos, sin = angles.cos(), angles.sin()
    factor = rotary_attention_factor(scaling)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


class _Rotate(torch.autograd.Function):
    """Rotation of channel pairs (i, i + head_dim / 2); its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = rotated.chunk(2, dim=-1)
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
    return rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of queries or keys, computed in fp32: [batch, seq, heads, head_dim] -> the same.

    Where there are fewer angles than channel pairs, the channels after the first 2 x angles stay as they are.
    """
    width = 2 * cos.shape[-1]
    if width == x.shape[-1]:
        return _Rotate.apply(x, cos, sin)
    return torch.cat((_Rotate.apply(x[..., :width], cos, sin), x[..., width:]), dim=-1)


@cache
@torch.inference_mode(False)
def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Slope of every head's linear penalty on distance: [heads], fp32 (Press et al. 2022, section 3).

    For n heads, n a power of two: the geometric sequence that starts at, and has the ratio, 2^(-8/n). Otherwise the
    sequence of the power below n, then every other member of the sequence of the power above.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * (heads - below), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """positions [...] -> [..., width], fp32: sines in even and cosines in odd channels (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[..., None].float() * 10000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


class PositionTable(nn.Module):
    """Adds a vector per position to the embeddings, then drops out. Layer: stream -> stream."""

    def __init__(self, config: BlockConfig, layers: Layers, *, std: float, seed: int) -> None:
        """Where positions enter otherwise (rotary, alibi, none), this is the embeddings' dropout alone."""
        super().__init__()
        self.layers = layers
        self.kind = config.position
        self.length = config.max_position_embeddings
        self.dropout = Dropout(config.hidden_dropout, seed, "positions")
        if self.kind == "learned":
            self.weight = nn.Parameter(torch.empty(self.length, config.hidden_size))
            declare(self.weight, Spec(std=std))

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, segment_ids, positions, sample_ids = stream
        places = self.layers.split(positions.flatten())
        if self.kind == "learned":
            hidden = hidden + nn.functional.embedding(places, self.layers.replicated(self.weight))
        elif self.kind == "sinusoidal":
            hidden = hidden + sinusoids(places, hidden.shape[-1]).to(hidden.dtype)
        rows = None
        if self.dropout.active:
            rows = self.layers.split(token_rows(positions, sample_ids, self.length))
        return self.dropout(hidden, rows), segment_ids, positions, sample_ids
