"""Every attention backend on one GPU: TFLOP/s at heads of 64 and 128, 2k to 16k tokens, forward and with backward.

Causal, in bf16, 16,384 tokens and a width of 2,048 in all shapes, once as whole rows and once packed with documents
that do not see one another. Before a backend is timed its output and gradients are compared with the plain backend's
in fp64; one that is off is not timed, and the script exits with 1. One that cannot serve says why.

Counted are the pairs of tokens that see each other and no others: 4 FLOPs per pair and channel forward, 14 with the
backward pass (which computes the scores again). A kernel that computes hidden pairs too is as slow as it is. `of
matmul` is the share of the rate of a bare matrix product measured beside each shape.
"""

import argparse
import math
import statistics
from typing import Any

import torch
from gpu_measure import Results, choose_device, introduce, kernel_parser, matmul_rate, time_calls, timing
from torch import Tensor

from megalm.errors import main_guard, reason
from megalm.nn.kernels import BACKENDS, LONG, Mask, Requirements, attention

DTYPE = torch.bfloat16
WIDTH, TOKENS = 2048, 16384
TOLERANCE = 2 * torch.finfo(DTYPE).eps
"""Of output and gradients, relative; that of megalm's own self-check."""
PASSES = {"forward": 4, "forward and backward": 14}
"""FLOPs per visible pair of tokens and channel: two products forward, five backward."""


def main() -> int:
    arguments = parse()
    device = choose_device(arguments.device)
    results = Results(arguments.output)
    introduce(device, results, "attention")
    print(f"{'backend':12}{'head':>6}{'length':>8}  {'rows':8}{'pass':22}{'ms':>9}{'spread':>9}{'TFLOP/s':>10}"
          f"{'of matmul':>11}", flush=True)  # fmt: skip
    wrong = 0
    for head_dim in (64, 128):
        for length in arguments.length:
            for packed in (False, True):
                matmul = matmul_rate(device)
                for name in BACKENDS:
                    shape = {"backend": name, "head_dim": head_dim, "length": length, "packed": packed}
                    row = measure(**shape, tokens=arguments.tokens, device=device, repeats=arguments.repeats)
                    wrong += "wrong" in row
                    results.write(**shape, matmul_tflops=matmul / 1e12, **row)
                    show(shape, row, matmul)
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    given = kernel_parser(__doc__, "attention", quick="2k and 16k only, 5 calls").parse_args()
    given.tokens, given.length = TOKENS, [2048, 4096, 8192, 16384]
    if given.quick:
        given.length, given.repeats = [2048, 16384], 5
    if given.preset == "tiny":
        given.tokens, given.length, given.repeats = 256, [128], 2
    return given


def measure(
    backend: str, head_dim: int, length: int, packed: bool, tokens: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Seconds and TFLOP/s of both passes, or why there are none: `refused` or `wrong`."""
    needs = Requirements(device.type, DTYPE, head_dim=head_dim, segments=packed, long=length > LONG)
    if refusal := BACKENDS[backend].refusal(needs):
        return {"refused": refusal}
    heads = max(1, WIDTH // head_dim) if device.type == "cuda" else 2
    try:
        # As long as fp64 scores allow, and as odd as rows come: 64 mod 128.
        check = min(length, 1024) - 64
        if problem := fault(backend, head_dim, heads, check, packed, device):
            return {"wrong": problem}
        return time_passes(backend, tokens // length, length, heads, head_dim, packed, device, repeats)
    except torch.OutOfMemoryError:
        return {"refused": "out of memory: it keeps the scores of all pairs"}
    except Exception as error:  # a kernel built for another torch or GPU fails in any way it likes
        return {"refused": f"{type(error).__name__}: {reason(error)}"}


def fault(backend: str, head_dim: int, heads: int, length: int, packed: bool, device: torch.device) -> str:
    """What of a backend's output and gradients is not the plain backend's in fp64; empty if all are."""
    inputs, gradient = sample(2, length, heads, head_dim, device)
    mask = causal_mask(2, length, packed, device)

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves, mask, name)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    pairs = zip(("output", "dq", "dk", "dv"), run(backend, DTYPE), run("plain", torch.float64), strict=True)
    for what, ours, exact in pairs:
        distance = ((ours.double() - exact).norm() / exact.norm()).item()
        if not distance < TOLERANCE:
            return f"{what} is {distance:.1e} from fp64's, relatively"
    return ""


def time_passes(
    backend: str, batch: int, length: int, heads: int, head_dim: int, packed: bool, device: torch.device, repeats: int
) -> dict[str, Any]:
    inputs, gradient = sample(batch, length, heads, head_dim, device)
    mask = causal_mask(batch, length, packed, device)
    found = {}

    def forward() -> Tensor:
        return attention(*inputs, mask, backend)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, gradient)

    for (name, flops), call in zip(PASSES.items(), (torch.no_grad()(forward), both), strict=True):
        seconds = time_calls(call, device, repeats)
        work = flops * heads * head_dim * batch * visible_pairs(length, packed)
        found[name] = timing(seconds) | {"tflops": work / statistics.median(seconds) / 1e12}
    return found


def sample(batch: int, length: int, heads: int, head_dim: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k and v that want gradients, and a gradient of the output: [batch, length, heads, head_dim]."""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = torch.randn(4, batch, length, heads, head_dim, generator=draw, device=device).to(DTYPE)
    return [x.clone().requires_grad_() for x in (q, k, v)], gradient


def document_lengths(length: int) -> list[int]:
    """Of a packed row: short and long ones, as text has them; together `length`."""
    shares = [1, 2, 3, 10, 16, 32]
    lengths = [length * share // 64 for share in shares[:-1]]
    return [*lengths, length - sum(lengths)]


def causal_mask(batch: int, length: int, packed: bool, device: torch.device) -> Mask:
    if not packed:
        return Mask("causal")
    lengths = torch.tensor(document_lengths(length), device=device)
    segments = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths).repeat(batch, 1)
    return Mask("causal", query_segments=segments, key_segments=segments)


def visible_pairs(length: int, packed: bool) -> int:
    """Pairs of a token and one that it sees, itself among them, in a row."""
    return sum(math.comb(each + 1, 2) for each in (document_lengths(length) if packed else [length]))


def show(shape: dict[str, Any], row: dict[str, Any], matmul: float) -> None:
    start = f"{shape['backend']:12}{shape['head_dim']:>6}{shape['length']:>8}  " + (
        "packed  " if shape["packed"] else "whole   "
    )
    if reason := row.get("refused") or row.get("wrong"):
        print(f"{start}{'WRONG: ' if 'wrong' in row else ''}{reason}", flush=True)
        return
    for name in PASSES:
        found = row[name]
        print(f"{start}{name:22}{found['seconds'] * 1000:>9.3f}{found['spread']:>9.1%}{found['tflops']:>10.1f}"
              f"{found['tflops'] * 1e12 / matmul:>11.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main_guard(main)
