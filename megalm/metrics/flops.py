"""Floating-point operations of training, and the share of the hardware's peak they use.

A multiplication and the addition after it are two operations. Matrix products are counted and nothing else: a weight
takes 2 per token in the forward pass and 4 in the backward pass. Recomputed activations are not counted (they are
the price of a layout, not work on the model), so MFU can be compared between layouts.
"""

import re

# Dense bf16 tensor-core peak with fp32 accumulation, in TFLOP/s, from the vendors' data sheets (fp16 on V100 and T4,
# which have no bf16). The first row whose words all occur in the device's name counts.
PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250.0),
    (("GB200",), 2500.0),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("GH200",), 989.4),
    (("H100", "PCIE"), 756.0),
    (("H100", "NVL"), 835.5),
    (("H100",), 989.4),
    (("H800", "PCIE"), 756.0),
    (("H800",), 989.4),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10",), 125.0),
    (("A6000",), 154.8),
    (("L40S",), 362.1),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("5090",), 209.5),
    (("4090",), 165.2),
    (("3090",), 71.0),
    (("V100", "PCIE"), 112.0),
    (("V100",), 125.0),
    (("T4",), 65.0),
)


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of one GPU, by the name that the driver gives it; None for one that is not in the table."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next((tflops * 1e12 for needed, tflops in PEAK_TFLOPS if words.issuperset(needed)), None)


def matmul_parameters(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    intermediate_size: int,
    gated: bool,
    vocab_size: int,
) -> int:
    """Weights that a token is multiplied with: all matrices of the blocks and the output head, tied or not.

    The embedding is looked up, not multiplied, so it does not count; nor do norms, biases and positions.
    """
    attention = hidden_size * head_dim * 2 * (num_attention_heads + num_key_value_heads)
    feedforward = hidden_size * intermediate_size * (3 if gated else 2)
    return num_layers * (attention + feedforward) + vocab_size * hidden_size


def flops_per_token(
    matmul_parameters: int,
    *,
    num_layers: int,
    num_attention_heads: int,
    head_dim: int,
    sequence_length: int,
    sliding_window: int | None = None,
    causal: bool,
) -> float:
    """Training FLOPs (forward and backward) per token: 6 N + 12 L H Q T (PaLM, appendix B).

    causal=False is that formula: every token is counted against all T of its sequence. causal=True counts what a
    causal kernel needs, half of it. A sliding window W caps T at W; under causal the first W tokens of a sequence see
    fewer, which leaves W (1 - W / 2T) on average.
    """
    window = min(sliding_window or sequence_length, sequence_length)
    span = window * (1 - window / (2 * sequence_length)) if causal else window
    return 6 * matmul_parameters + 12 * num_layers * num_attention_heads * head_dim * span


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float, num_devices: int) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): achieved over peak, 0 to 1. tokens_per_second is of all devices."""
    return tokens_per_second * flops_per_token / (peak_flops * num_devices)
