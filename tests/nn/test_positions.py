"""Angles, slopes and tables against the papers' formulas in Python floats, and Hugging Face's Bloom."""

import math

import pytest
import torch
from pydantic import ValidationError
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from megalm.nn.config import BlockConfig, RopeScaling
from megalm.nn.layers import Layers
from megalm.nn.position import PositionTable, alibi_slopes, rotary_angles, rotary_frequencies, rotate, sinusoids

CPU = torch.device("cpu")


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 20, 71])
def test_alibi_slopes_equal_bloom(heads: int) -> None:
    seen = torch.ones(1, 2, dtype=torch.int64)
    bloom = build_alibi_tensor(seen, heads, torch.float32)[:, 0, 1]  # slope x 1
    assert torch.allclose(alibi_slopes(heads, CPU), bloom, rtol=1e-6)


def test_alibi_slopes_are_not_one_sequence_for_six_heads() -> None:
    """The comparison with Bloom would catch a plain 2^(-8 i / n)."""
    naive = torch.tensor([2 ** (-8 * (i + 1) / 6) for i in range(6)])
    assert not torch.allclose(alibi_slopes(6, CPU), naive, rtol=1e-2)


def test_rotation_is_the_complex_product() -> None:
    """(x_i + x_{i + d/2} sqrt(-1)) exp(sqrt(-1) position / theta^(2 i / d)), in fp64."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 8, generator=draw)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [5, 6, 7, 8, 9, 10, 11]])
    rotated = rotate(x, *rotary_angles(positions, 8, 100.0, None))
    expected = torch.empty(2, 7, 3, 8, dtype=torch.float64)
    for i in range(4):
        turn = torch.polar(
            torch.ones(2, 7, 1, dtype=torch.float64), positions.double()[:, :, None] / 100 ** (2 * i / 8)
        )
        pair = torch.complex(x[..., i].double(), x[..., i + 4].double()) * turn
        expected[..., i], expected[..., i + 4] = pair.real, pair.imag
    assert (rotated - expected).abs().max() < 2e-6
    assert (rotate(x, *rotary_angles(positions + 1, 8, 100.0, None)) - expected).abs().max() > 0.1


def test_rotation_gradient() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = (angle.double() for angle in rotary_angles(torch.arange(3)[None], 4, 10.0, None))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def test_angles_are_fp32_whatever_the_model_is() -> None:
    """Position 2047 is not a bf16 number: angles from a cast table would be off by whole radians."""
    positions = torch.tensor([[2047]])
    cos, sin = rotary_angles(positions, 4, 10000.0, None)
    assert cos.dtype == torch.float32
    assert abs(cos[0, 0, 0, 0].item() - math.cos(2047.0)) < 1e-6
    x = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16)
    assert abs(rotate(x, cos, sin)[0, 0, 0, 0].item() - (math.cos(2047.0) - math.sin(2047.0))) < 0.01


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaling_by_one_changes_no_frequency(kind: str) -> None:
    scaling = RopeScaling(kind=kind, factor=1.0, original_max_position_embeddings=16)
    positions = torch.arange(20)[None]
    for scaled, plain in zip(
        rotary_angles(positions, 16, 1e4, scaling), rotary_angles(positions, 16, 1e4, None), strict=True
    ):
        assert torch.allclose(scaled, plain, atol=1e-6)


def test_sinusoids_follow_the_paper() -> None:
    table = sinusoids(torch.arange(50), 10)
    for position in (0, 1, 49):
        for pair in range(5):
            angle = position / 10000 ** (2 * pair / 10)
            assert abs(table[position, 2 * pair].item() - math.sin(angle)) < 1e-5
            assert abs(table[position, 2 * pair + 1].item() - math.cos(angle)) < 1e-5


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "rotary"])
def test_position_layer_adds_the_row_of_each_position(kind: str) -> None:
    config = BlockConfig(hidden_size=6, num_attention_heads=1, position=kind, max_position_embeddings=8)
    layer = PositionTable(config, Layers(), std=1.0, seed=0)
    if kind == "learned":
        torch.nn.init.normal_(layer.weight)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    hidden = torch.randn(10, 6)
    out, *rest = layer((hidden, torch.zeros_like(positions), positions, torch.arange(2)))
    added = {"learned": lambda p: layer.weight[p], "sinusoidal": lambda p: sinusoids(p, 6), "rotary": lambda p: 0.0}
    assert torch.allclose(out - hidden, added[kind](positions.flatten()) + torch.zeros(10, 6), atol=1e-6)
    assert rest[1] is positions


def test_caches_filled_in_inference_mode_serve_training() -> None:
    rotary_frequencies.cache_clear()
    alibi_slopes.cache_clear()
    positions = torch.arange(3)[None]
    with torch.inference_mode():
        rotary_angles(positions, 8, 77.0, None)
        alibi_slopes(3, CPU)
    x = torch.ones(3, requires_grad=True)
    (x * alibi_slopes(3, CPU)).sum().backward()
    frequencies = rotary_frequencies(8, 77.0, None, CPU)
    assert not frequencies.is_inference() and x.grad is not None
    y = torch.ones(4, requires_grad=True)
    (y * frequencies).sum().backward()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor 4 must be below"),
        ({"kind": "llama3", "low_freq_factor": 8.0}, "low_freq_factor 8 must be below high_freq_factor 4"),
        ({"kind": "yarn", "beta_fast": 1.0, "beta_slow": 32.0}, "beta_slow 32 must be below beta_fast 1"),
    ],
)
def test_scaling_bounds_are_in_order(wrong: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RopeScaling(factor=2.0, **wrong)
    RopeScaling(factor=2.0, **wrong | {"kind": "linear"})
