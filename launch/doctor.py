"""What this machine's install has, lacks, and has of the wrong kind; and the command that mends it.

Nothing heavy is imported here: torch is asked in a process of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path

from launch.target import REPOSITORY
from megalm import nvidia_apex

THERE, OPTIONAL, MISSING, WRONG = "there", "not there", "MISSING", "WRONG"

_ASK_TORCH = """
import json, torch
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    "gloo": torch.distributed.is_gloo_available(),
    "nccl": torch.distributed.is_nccl_available(),
}))
"""


@dataclass(frozen=True)
class Finding:
    """state: there; not there (and optional); MISSING or WRONG, which `mend` puts right."""

    what: str
    state: str
    words: str
    mend: str = ""


def examine() -> list[Finding]:
    """All findings about this machine."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _torch,
        _apex,
        _flash_attention,
        _programs,
        _machine,
    ]
    return [finding for check in checks for finding in check()]


def report(findings: list[Finding]) -> list[str]:
    """The findings as lines; those to mend come with the command."""
    width = max(len(each.what) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{each.what:{width}}  {each.state:9}  {each.words}".rstrip())
        if each.mend and each.state in (MISSING, WRONG):
            lines.append(f"{'':{width}}  -> {each.mend}")
    return lines


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("Python", THERE if good else WRONG, f"{found} ({sys.executable})", "install Python 3.11 or newer")
    try:
        where = Path(str(distribution("megalm").locate_file("")))
        direct = distribution("megalm").read_text("direct_url.json") or ""
        elsewhere = "file://" in direct and json.loads(direct)["url"].removeprefix("file://") != str(REPOSITORY)
    except PackageNotFoundError:
        yield Finding("megalm", MISSING, "not installed in this environment", "make setup")
        return
    words = f"{version('megalm')} ({json.loads(direct)['url'] if direct else where})"
    if elsewhere:
        words += f"; this launcher is of {REPOSITORY}, which goes before"
    yield Finding("megalm", THERE, words)


def _packages() -> Iterator[Finding]:
    """What pyproject.toml asks for, and what its extras bring."""
    for line in requires("megalm") or []:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([<>=!~0-9., ]*)(?:;.*extra == ['\"](\w+)['\"])?", line)
        if match is None or match[3] in ("dev", "flash") or match[1] in ("megalm", "torch"):
            continue
        name, wanted, extra = match[1], match[2].strip(), match[3]
        mend = f"pip install '{name}{wanted}'" if extra is None else f"pip install 'megalm[{extra}]'"
        if name == "deepspeed":
            mend = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed (after torch, setuptools, wheel, ninja)"
        try:
            found = version(name)
        except PackageNotFoundError:
            state = MISSING if extra is None else OPTIONAL
            yield Finding(name, state, wanted if extra is None else f"for the extra {extra}: {mend}", mend)
            continue
        good = satisfies(found, wanted)
        yield Finding(name, THERE if good else WRONG, found if good else f"{found}, not {wanted}", mend)


def satisfies(found: str, wanted: str) -> bool:
    """Whether a version is within `>=A,<B`."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:4]]

    for clause in filter(None, (part.strip() for part in wanted.split(","))):
        sign, bound = clause.rstrip("0123456789.abcrv"), numbers(clause)
        if (sign == ">=" and numbers(found) < bound) or (sign == "<" and numbers(found) >= bound):
            return False
    return True


def _torch() -> Iterator[Finding]:
    install = "pip install a torch for this machine: https://pytorch.org/get-started/locally"
    if find_spec("torch") is None:
        yield Finding("torch", MISSING, "", install)
        return
    try:
        asked = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=300)
        torch = json.loads(asked.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        yield Finding(
            "torch", WRONG, "it does not import (python -c 'import torch')", f"pip uninstall torch; {install}"
        )
        return
    words = f"{torch['version']}, " + (f"CUDA {torch['cuda']}" if torch["cuda"] else "for CPUs")
    has_gpus = shutil.which("nvidia-smi") is not None
    if not satisfies(torch["version"], ">=2.6"):
        yield Finding("torch", WRONG, f"{words}, older than 2.6", install)
    elif has_gpus and not torch["cuda"]:
        yield Finding("torch", WRONG, f"{words}, on a machine with GPUs", f"pip uninstall torch; {install}")
    elif has_gpus and not torch["devices"]:
        yield Finding("torch", WRONG, f"{words}, which sees no GPU", "update the driver (nvidia-smi names its CUDA)")
    else:
        gpus = f"; {len(torch['devices'])} x {torch['devices'][0]}" if torch["devices"] else ""
        yield Finding("torch", THERE, words + gpus)
    missing = [name for name in ("gloo", *(["nccl"] if torch["cuda"] else [])) if not torch[name]]
    if missing:
        yield Finding("torch.distributed", WRONG, f"built without {' and '.join(missing)}", install)


def _apex() -> Iterator[Finding]:
    how, spec = nvidia_apex.HOW_TO_INSTALL, nvidia_apex.installed()
    if spec is None:
        yield Finding("apex", OPTIONAL, f"for fused norms and AdamW: {how}")
    elif not nvidia_apex.is_nvidias(spec):
        words = "the PyPI project named apex is another one, not NVIDIA's"
        yield Finding("apex", WRONG, words, f"pip uninstall apex; to have it, {how}")
    else:
        yield Finding("apex", THERE, f"NVIDIA's ({spec.origin})")


def _flash_attention() -> Iterator[Finding]:
    try:
        placeholder = bool(version("flash-attn-3")) and find_spec("flash_attn_interface") is None
    except PackageNotFoundError:
        placeholder = False
    if placeholder:
        mend = (
            "pip uninstall flash-attn-3; build it from source (https://github.com/Dao-AILab/flash-attention, hopper/)"
        )
        yield Finding("flash-attn 3", WRONG, "PyPI's flash-attn-3 is an empty placeholder", mend)
    two = find_spec("flash_attn")
    if two and two.origin:  # a folder without a module of its own is flash-attn 4's
        yield Finding("flash-attn 2", THERE, "")
    else:
        yield Finding("flash-attn 2", OPTIONAL, "source only, needs nvcc: pip install --no-build-isolation flash-attn")
    if find_spec("flash_attn_interface"):
        yield Finding("flash-attn 3", THERE, "")
    if two and any((Path(place) / "cute").is_dir() for place in two.submodule_search_locations or []):
        yield Finding("flash-attn 4", THERE, "")


def _programs() -> Iterator[Finding]:
    for program, arguments, why in (
        ("nvidia-smi", ["--query-gpu=name,driver_version", "--format=csv,noheader"], "no NVIDIA GPU, or no driver"),
        ("nvcc", ["--version"], "only to build kernels"),
        ("sbatch", ["--version"], "only on a cluster with Slurm"),
        ("pdsh", ["-V"], "only for DeepSpeed's launcher over a hostfile"),
        ("git", ["--version"], "to note which code a run had"),
    ):
        if shutil.which(program) is None:
            yield Finding(program, OPTIONAL, why)
            continue
        said = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        lines = [line for line in (said.stdout + said.stderr).splitlines() if line.strip()] or [""]
        line = next((line for line in lines if "release" in line), lines[0])
        if said.returncode and program == "sbatch":
            yield Finding(program, OPTIONAL, "Slurm's commands are here, but no cluster that they know")
            continue
        mend = "reinstall the driver" if program == "nvidia-smi" else f"reinstall {program}"
        yield Finding(program, WRONG if said.returncode else THERE, line.strip(), mend)


def _machine() -> Iterator[Finding]:
    free = shutil.disk_usage(os.getcwd()).free
    yield Finding(
        "disk",
        THERE if free > 2e9 else WRONG,
        f"{free / 1e9:.1f} GB free here",
        "make room: checkpoints take 12 bytes a parameter",
    )
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").total
        mend = "start the container with --shm-size=16g or --ipc=host: NCCL needs it"
        yield Finding("/dev/shm", THERE if shared > 1e9 else WRONG, f"{shared / 1e9:.1f} GB", mend)
