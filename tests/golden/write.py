"""Rewrite the golden curves, which tests/distributed/test_golden.py holds the code against.

python tests/golden/write.py

A curve is the loss and the gradient norm of each step of a tiny run, every digit of them. What moves one of them by a
bit moves every run: a commit that changes these files must say why.
"""

import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed.ranks import run_ranks  # noqa: E402
from tests.distributed.training import config, engine_curve  # noqa: E402

COMMAND = "python tests/golden/write.py"
Curve = list[tuple[float, float]]

# Written out here: what a golden curve trains must not change with another test.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu", "num_key_value_heads": 2},
    "gpt": {
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu_tanh",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "z_loss": 1e-3,
    },
    "qwen": {"norm": "rmsnorm", "position": "rotary", "qk_norm": True, "tie_word_embeddings": True},
}
PRECISIONS = ("fp32", "bf16", "fp16")
LAYOUTS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "llama": {"one rank": (1, {}), "tensor 2 x data 2, ZeRO 1": (4, {"tensor": 2, "zero": 1})},
    "gpt": {"one rank": (1, {}), "pipeline 2, ZeRO 1": (2, {"pipeline": 2, "zero": 1})},
    "qwen": {"one rank": (1, {}), "data 2, ZeRO 3": (2, {"zero": 3})},
}


def measure(family: str, precision: str, layout: str, plant: Callable[[], None] | None = None) -> Curve:
    """(loss, gradient norm) of each step. plant: breaks something first."""
    ranks, parallel = LAYOUTS[family][layout]
    run = config(
        # At the default 0.02 the gradient norm under qk_norm spikes now and then: a last bit becomes 2% of it in bf16.
        model={"num_layers": 2, "init_std": 0.05, **MODELS[family]},
        train={"precision": precision, "micro_batch_size": 4},
        parallel=parallel,
    )
    return run_ranks(ranks, _curve, run, plant)[0]


def _curve(run: Any, plant: Callable[[], None] | None) -> Curve:
    from tests.distributed.sabotage import pretend_fp16  # only in ranks: it imports DeepSpeed

    if run.train.precision == "fp16":
        pretend_fp16()
    return engine_curve(run, sabotage=plant)


def read(family: str) -> dict[str, Any]:
    """What `main` wrote: the machine, and curves by precision and layout."""
    return json.loads(_path(family).read_text())


def machine() -> dict[str, str]:
    """What chooses the kernels and the functions they call, and with them the last bits."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "libc": " ".join(platform.libc_ver()),
    }


def _processor() -> str:
    """Name and numbers, for a virtual machine may hide the model in the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return ", ".join(f"{key} {facts[key]}" for key in ("model name", "cpu family", "model", "stepping") if key in facts)


def _path(family: str) -> Path:
    return Path(__file__).with_name(f"{family}.json")


def main() -> None:
    for family, layouts in LAYOUTS.items():
        curves = {p: {layout: measure(family, p, layout) for layout in layouts} for p in PRECISIONS}
        text = json.dumps({"machine": machine(), "curves": curves}, indent=2)
        steps = re.sub(r"\[\s+(\S+),\s+(\S+)\s+\]", r"[\1, \2]", text)  # one a line
        _path(family).write_text(steps + "\n")
        print(f"wrote {_path(family)}")


if __name__ == "__main__":
    main()
