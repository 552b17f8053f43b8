"""Memory of both commands, the gate included, is a few times that of the largest tensor, and not that of the model.

They run in a process whose address space is limited (as `ulimit -v` does) to what it holds before them and that much
more: what it allocates, the files that it maps and its threads all count.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import models

LIMITED = """
import resource, sys, threading
from pathlib import Path
import torch
from megalm.convert.conversion import from_hf, to_hf

folder, allowed, whole = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def both(name):
    one = to_hf(folder / name, folder / f"{name}-hf", workers=2)
    other = from_hf(folder / f"{name}-hf", folder / f"{name}-back", workers=2)
    return max(one.verdict.difference, other.verdict.difference)

def size(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

threading.stack_size(1 << 18)
both("small")  # loads what is loaded at its first use
held = size("VmSize")
resource.setrlimit(resource.RLIMIT_AS, (held + allowed,) * 2)
try:
    torch.empty(whole, dtype=torch.uint8)
except RuntimeError:
    print(both("large"), size("VmPeak") - held)
else:
    sys.exit("the limit does not hold")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_both_commands_in_less_memory_than_the_model(tmp_path: Path, tokenizer_path: Path) -> None:
    model, config = models.build(hidden_size=384, intermediate_size=1536, num_layers=20, init_std=0.03)
    largest, whole = (4 * of(parameter.numel() for parameter in model.parameters()) for of in (max, sum))
    allowed = 16 * largest
    assert whole > 5 * allowed
    models.checkpoint(tmp_path / "large", model, config, tokenizer_path, tensor=2, moments=False)
    models.checkpoint(tmp_path / "small", *models.build(), tokenizer_path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path, str(allowed), str(whole)],
        capture_output=True,
        text=True,
        # glibc keeps some of what is freed; so set, it gives tensors back, and what is limited is in use
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    difference, used = map(float, done.stdout.split())
    assert difference < 1e-4
    print(f"{used / 1e6:.1f} MB, of a model of {whole / 1e6:.0f} MB whose largest tensor has {largest / 1e6:.1f} MB")
