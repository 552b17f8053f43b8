"""Python runs this at the start of every process that has this folder on its path: faults planted in training ranks.

MEGALM_RECORD names a folder: every rank notes there which samples each of its steps takes, by number.
MEGALM_PLANT is a list of faults, as JSON: {"rank": 3, "samples": 192, "do": "hang" | "kill" | "slow", "once": FILE}.
One happens where the rank takes the samples up to that number (slow: those of every later step too), and if `once` is
given, in the first process that comes there only. "node": "n2" instead of a rank means every rank on that node.
"""

import json
import os
import signal
import socket
import sys
import time


def plant() -> None:
    from megalm.data.loader import Loader

    rank = int(os.environ["RANK"])
    faults = json.loads(os.environ.get("MEGALM_PLANT", "[]"))
    folder = os.environ.get("MEGALM_RECORD")
    right = Loader.__next__

    def following(self: Loader):  # type: ignore[no-untyped-def]
        batches, state = right(self)
        samples = state["samples"]
        if folder:
            ids = [int(number) for batch in batches for number in batch.sample_ids]
            with open(os.path.join(folder, f"rank-{rank}.jsonl"), "a") as file:
                start = [os.environ["MASTER_PORT"], os.environ["WORLD_SIZE"]]  # which all ranks of a start share
                line = {"samples": samples, "ids": ids, "start": start, "time": time.time()}
                file.write(json.dumps(line) + "\n")
        for fault in faults:
            late = samples > fault["samples"] and fault["do"] == "slow"
            here = fault["node"] == socket.gethostname() if "node" in fault else fault["rank"] == rank
            if here and (late or samples == fault["samples"]):
                happen(fault)
        return batches, state

    Loader.__next__ = following  # type: ignore[method-assign]


def happen(fault: dict) -> None:  # type: ignore[type-arg]
    if "once" in fault:
        try:
            os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if fault["do"] == "hang":
        time.sleep(3600)
    elif fault["do"] == "slow":
        time.sleep(fault["seconds"])
    elif fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


if "RANK" in os.environ and any(part.endswith("train.py") for part in sys.orig_argv):
    plant()
