"""Memory of both directions is a few times that of the largest tensor, and not that of the model.

Measured in a process of its own as the peak of anonymous memory (what the process allocates; pages of the files that it
maps are the system's to drop) above what it holds before the conversion.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import models

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import numpy, torch, safetensors.torch
from megalm.convert.conversion import from_hf, to_hf

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

direction, source, output, small = sys.argv[1:]
convert = {"to": to_hf, "from": from_hf}[direction]
convert(Path(small), Path(output + "-small"), verify=False)  # loads what is loaded at its first use
done, base = False, anonymous()
peak = base
thread = threading.Thread(target=watch)
thread.start()
try:
    convert(Path(source), Path(output), verify=False, workers=2)
finally:
    done = True
    thread.join()
print(json.dumps(peak - base))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory(tmp_path: Path, tokenizer_path: Path) -> None:
    model, config = models.build(hidden_size=512, intermediate_size=2048, num_layers=16)
    step = models.checkpoint(tmp_path / "run", model, config, tokenizer_path, tensor=2)
    largest = max(4 * parameter.numel() for parameter in model.parameters())
    whole = sum(4 * parameter.numel() for parameter in model.parameters())
    bound = 16 * largest
    assert whole > 3.9 * bound
    small = models.checkpoint(tmp_path / "small", *models.build(), tokenizer_path)
    for direction, source, output, first in (
        ("to", step, tmp_path / "hf", small),
        ("from", tmp_path / "hf", tmp_path / "back", tmp_path / "hf-small"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, direction, source, output, first],
            capture_output=True,
            text=True,
            check=True,
            # glibc keeps some of what is freed; so set, it gives tensors back, and what is measured is in use
            env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        )
        used = json.loads(done.stdout)
        print(f"{direction}: {used / 1e6:.1f} MB of a model of {whole / 1e6:.0f} MB, largest {largest / 1e6:.1f} MB")
        assert used < bound, direction
