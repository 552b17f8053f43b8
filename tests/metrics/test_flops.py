import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megalm.metrics.flops import flops_per_token, matmul_parameters, mfu, peak_flops

SHAPE = {"num_layers": 3, "num_attention_heads": 4, "head_dim": 8}
N = matmul_parameters(**SHAPE, hidden_size=24, num_key_value_heads=2, intermediate_size=40, gated=True, vocab_size=50)


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        vocab_size=50,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def test_matmul_parameters_are_the_linear_layers(llama):
    linears = [module for module in llama.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(linear.weight.numel() for linear in linears) == N


def test_formula_equals_torchs_counter(llama):
    """Exactly: both count the matrix products of forward and backward, and nothing else."""
    batch, length = 2, 32
    tokens = torch.randint(0, 50, (batch, length))
    with FlopCounterMode(display=False) as counter:
        llama(tokens, labels=tokens).loss.backward()
    formula = flops_per_token(N, **SHAPE, sequence_length=length, causal=False)
    assert counter.get_total_flops() == formula * batch * length
    # Negative control: without the head in N (as when a tied head is forgotten) the counts part.
    without_head = flops_per_token(N - 50 * 24, **SHAPE, sequence_length=length, causal=False)
    assert counter.get_total_flops() > 1.05 * without_head * batch * length


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_causal_count_is_the_mask(window):
    """The mean number of keys a token sees, up to half a key (a token sees itself whole, the formula half)."""
    length = 64
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = (j <= i) & (i - j < (window or length))
    per_key = 12 * 3 * 4 * 8
    count = flops_per_token(0, **SHAPE, sequence_length=length, sliding_window=window, causal=True) / per_key
    assert abs(count - seen.sum().item() / length) <= 0.5


def test_causal_is_half_of_full_attention():
    full = flops_per_token(N, **SHAPE, sequence_length=64, causal=False)
    causal = flops_per_token(N, **SHAPE, sequence_length=64, causal=True)
    assert causal - 6 * N == (full - 6 * N) / 2
    assert (
        flops_per_token(N, **SHAPE, sequence_length=64, sliding_window=16, causal=False) - 6 * N == (full - 6 * N) / 4
    )


def test_mfu_of_palm():
    """Chowdhery et al. 2022: 540.35B parameters in 118 layers of 48 heads of 256, 238.3K tokens/s of length 2048 on
    6144 TPU v4 of 275 TFLOP/s, is reported as 46.2 %."""
    flops = flops_per_token(
        540_350_000_000, num_layers=118, num_attention_heads=48, head_dim=256, sequence_length=2048, causal=False
    )
    assert mfu(238_300, flops, 275e12, 6144) == pytest.approx(0.462, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
    ],
)
def test_peak_of_known_gpus(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA A1000", "cpu", ""])
def test_an_unknown_gpu_has_no_peak(name):
    assert peak_flops(name) is None
