"""Memory of curation, whose promise is that it does not grow with the input.

    python benchmarks/curation_memory.py [--megabytes 20 200] [--documents 30000 300000]

First, JSONL to JSONL by one process with a step that keeps everything, of sources of several sizes: the largest
resident memory of the process tree's largest member. Then the merge of near_duplicates over sketches of documents that
are all different, of several numbers: CPU seconds and the largest resident memory, of a process that imports and does
nothing else.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MERGE = """
import resource, sys
from pathlib import Path
import numpy as np
from megalm.curate.steps.near_duplicates import NearDuplicates, NearDuplicatesSettings

folder, count = Path(sys.argv[1]), int(sys.argv[2])
step = NearDuplicates(NearDuplicatesSettings())
draw = np.random.default_rng(0)
with open(folder / "sketch", "wb") as file:
    for begin in range(0, count, 10_000):
        records = np.zeros(min(10_000, count - begin), step._sketch)
        records["id"] = np.arange(begin, begin + len(records))
        records["keys"] = draw.integers(0, 2**64, records["keys"].shape, dtype=np.uint64)
        file.write(records.tobytes())
(folder / "verdicts").mkdir()
before = resource.getrusage(resource.RUSAGE_SELF)
step.merge([folder / "sketch"], folder / "verdicts")
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, after.ru_maxrss / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[20, 200], metavar="N", help="of JSONL")
    parser.add_argument("--documents", type=int, nargs="*", default=[30_000, 300_000], metavar="N", help="to merge")
    given = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for megabytes in given.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder, "source.jsonl"), megabytes * 10**6)
            recipe = {
                "name": "memory",
                "directory": f"{folder}/out",
                "sources": [{"name": "source", "path": f"{folder}/source.jsonl"}],
                "steps": [{"kind": "sample", "share": 1.0}],
            }
            Path(folder, "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
            command = [sys.executable, str(REPOSITORY / "tools" / "curate.py"), "--config", f"{folder}/recipe.yaml"]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen([*command, "--workers", "1"], env=environment, **silent)
            _, status, used = os.wait4(process.pid, 0)
            assert status == 0, "the recipe failed"
            largest = used.ru_maxrss / 1024  # of itself and of what it waited for
            print(f"{megabytes:9,} MB of JSONL        {largest:7.0f} MB")
    for count in given.documents:
        with tempfile.TemporaryDirectory() as folder:
            said = subprocess.run(
                [sys.executable, "-c", MERGE, folder, str(count)],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            print(f"{count:9,} sketches merged    {float(said[1]):7.0f} MB  {float(said[0]):6.1f} CPU s")


def write(path: Path, size: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(5000)]
    with path.open("w") as file:
        while file.tell() < size:
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=300))}) + "\n")


if __name__ == "__main__":
    main()
