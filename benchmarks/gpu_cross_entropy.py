"""Cross entropy on one GPU: megalm's, torch's and Liger's, forward and backward, against a bare copy of the logits.

16,384 to 65,536 tokens x 50,304 and 128,256 ids in bf16. No pass can be faster than its traffic: forward reads the
logits once, backward reads them and writes their gradient. `of copy` is the traffic that a pass cannot do without over
its time, as a share of what a copy of the same logits moves a second. Before anything is timed, losses and gradients
are compared with torch's in fp64 on some of the tokens; what is off is an error.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import Results, choose_device, introduce, kernel_parser, time_calls
from torch import Tensor

from megalm.errors import main_guard, reason
from megalm.nn.cross_entropy import cross_entropy

SHAPES = ((65536, 50304), (32768, 50304), (16384, 50304), (16384, 128256))
"""The first has more than 2^31 logits, beyond 32-bit places."""
TINY = ((48, 1000),)
CHECKED = 48
"""Tokens, which fp64 has room for."""
TOLERANCE = 2 * torch.finfo(torch.bfloat16).eps
"""Of a gradient, relative; of a loss it is a thousand times less."""

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> int:
    arguments = parse()
    device = choose_device(arguments.device)
    results = Results(arguments.output)
    introduce(device, results, "cross_entropy")
    print(
        f"{'':10}{'tokens':>8}{'ids':>9}{'forward ms':>12}{'of copy':>9}{'backward ms':>13}{'of copy':>9}", flush=True
    )
    wrong = 0
    for tokens, ids in TINY if arguments.preset == "tiny" else SHAPES:
        logits, labels = sample(tokens, ids, device)
        traffic = logits.numel() * logits.element_size()
        copied = 2 * traffic / seconds_to_copy(logits, device, arguments.repeats)
        for name, loss in candidates().items():
            row = measure(loss, logits, labels, device, arguments.repeats)
            wrong += "wrong" in row
            results.write(loss=name, tokens=tokens, ids=ids, copied=copied, **row)
            show(name, tokens, ids, row, traffic, copied)
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    given = kernel_parser(__doc__, "cross_entropy", quick="5 calls").parse_args()
    given.repeats = 5 if given.quick else given.repeats
    return given


def candidates() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "megalm": cross_entropy,
        "torch": lambda logits, labels: F.cross_entropy(logits.float(), labels, reduction="none"),
    }
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return found
    # Its gradient takes the place of the logits: it gets a copy of them, which is not counted.
    return found | {"liger": lambda logits, labels: liger_cross_entropy(logits.clone(), labels, reduction="none")}


def sample(tokens: int, ids: int, device: torch.device) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    logits = torch.randn(tokens, ids, generator=draw, device=device, dtype=torch.bfloat16) * 2
    return logits, torch.randint(ids, (tokens,), generator=draw, device=device)


def seconds_to_copy(logits: Tensor, device: torch.device, repeats: int) -> float:
    there = torch.empty_like(logits)
    return statistics.median(time_calls(lambda: there.copy_(logits), device, repeats))


def measure(loss: Loss, logits: Tensor, labels: Tensor, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of both passes, or why there are none: `refused` or `wrong`."""
    try:
        if problem := fault(loss, logits[:CHECKED], labels[:CHECKED]):
            return {"wrong": problem}
        torch.compiler.reset()  # what has met two shapes is compiled for any; in a run there is one
        leaf = logits.detach().requires_grad_()
        weights = torch.rand(len(labels), device=device)
        forward = statistics.median(time_calls(lambda: loss(leaf, labels), device, repeats))

        def both() -> Tensor:
            return torch.autograd.grad(loss(leaf, labels), leaf, weights)[0]

        return {"forward": forward, "backward": statistics.median(time_calls(both, device, repeats)) - forward}
    except torch.OutOfMemoryError:
        return {"refused": "out of memory"}
    except Exception as error:  # a kernel built for another torch or GPU fails in any way it likes
        return {"refused": f"{type(error).__name__}: {reason(error)}"}


def fault(loss: Loss, logits: Tensor, labels: Tensor) -> str:
    """What is not torch's in fp64; empty if all is."""
    weights = torch.linspace(0.1, 1, len(labels), device=logits.device)

    def run(loss: Loss, leaf: Tensor) -> tuple[Tensor, Tensor]:
        out = loss(leaf, labels)
        return out.detach().double(), torch.autograd.grad(out, leaf, weights.to(out.dtype))[0].double()

    ours = run(loss, logits.detach().clone().requires_grad_())
    exact = run(lambda x, y: F.cross_entropy(x, y, reduction="none"), logits.detach().double().requires_grad_())
    for what, mine, theirs, allowed in zip(("loss", "gradient"), ours, exact, (TOLERANCE / 1000, TOLERANCE)):
        distance = ((mine - theirs).norm() / theirs.norm()).item()
        if not distance < allowed:
            return f"its {what} is {distance:.1e} from fp64's, relatively"
    return ""


def show(name: str, tokens: int, ids: int, row: dict[str, Any], traffic: int, copied: float) -> None:
    """copied: bytes a second that a copy reads and writes."""
    start = f"{name:10}{tokens:>8}{ids:>9}"
    if why := row.get("refused") or row.get("wrong"):
        print(f"{start}   {'WRONG: ' if 'wrong' in row else ''}{why}", flush=True)
        return
    shares = (traffic / row["forward"] / copied, 2 * traffic / row["backward"] / copied)
    print(f"{start}{row['forward'] * 1000:>12.3f}{shares[0]:>9.1%}{row['backward'] * 1000:>13.3f}{shares[1]:>9.1%}",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main_guard(main)
