"""Show what a checkpoint, or each checkpoint of a run, holds."""

import argparse
import math
import signal
import textwrap
from pathlib import Path
from typing import Any

import yaml

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError, main_guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="run folder or RUN/checkpoints/step-N")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare checksums")
    parser.add_argument("--tensors", action="store_true", help="a line for every weight")
    parser.add_argument("--statistics", action="store_true", help="... with mean, deviation and largest magnitude")
    arguments = parser.parse_args()

    from megalm.checkpoint import folder as checkpoints  # imports torch, which takes seconds

    folder = checkpoints.resolve(arguments.path)
    faults = {}
    if folder != arguments.path:
        faults = show_run(folder.parent, arguments.verify)
        print()
    manifest = manifests.read(folder)
    if folder not in faults:
        faults[folder] = manifests.faults(folder, manifest, manifest.files, checksums=arguments.verify)
    show(folder, manifest)
    for fault in faults[folder]:
        print(f"  DAMAGED      {fault}")
    if arguments.verify and not faults[folder]:
        print(f"  verified     all {len(manifest.files)} files are as they were written")
    if arguments.statistics and not faults[folder]:
        show_statistics(folder, manifest)
    elif arguments.tensors:
        show_tensors(manifest)
    for shown, found in faults.items():
        checkpoints.refuse_damaged(shown, found)


def show_run(directory: Path, checksums: bool) -> dict[Path, list[str]]:
    """Print a line for every checkpoint of RUN/checkpoints; returns what is wrong with each."""
    from megalm.checkpoint import folder as checkpoints

    newest = checkpoints.newest(directory)
    faults = {}
    print(f"{directory}")
    print(f"  {'step':>10} {'tokens':>16} {'MiB':>10}  layout")
    for step in checkpoints.steps(directory):
        folder = directory / f"step-{step}"
        try:
            manifest = manifests.read(folder)
        except MegalmError as error:
            print(f"  {step:>10} DAMAGED {error}")
            faults[folder] = [getattr(error, "fault", str(error))]
            continue
        faults[folder] = manifests.faults(folder, manifest, manifest.files, checksums=checksums)
        remark = " (newest)" if folder == newest else ""
        print(f"  {step:>10} {manifest.tokens:>16,} {mebibytes(manifest):>10,.1f}  {layout(manifest)}{remark}")
        for fault in faults[folder]:
            print(f"  {'':>10} DAMAGED {fault}")
    return faults


def show(folder: Path, manifest: Manifest) -> None:
    """Print what a checkpoint's manifest says."""
    model = manifest.config["model"]
    numbers = sum(math.prod(entry["shape"]) for entry in manifest.parameters.values())
    dtypes = sorted({entry["dtype"] for entry in manifest.parameters.values()})
    print(f"{folder}")
    print(f"  step         {manifest.step:,}")
    print(f"  tokens       {manifest.tokens:,} trained")
    print(f"  model        {numbers:,} weights in {len(manifest.parameters)} tensors, {', '.join(dtypes)}")
    print(f"               {model['num_layers']} layers, hidden size {model['hidden_size']}, ", end="")
    print(f"vocabulary {model['vocab_size']:,} (padding rows count as weights)")
    print(f"  tokenizer    {manifest.config['data']['tokenizer']}")
    print(f"  layout       {layout(manifest)}")
    print(f"  files        {len(manifest.files)}, {mebibytes(manifest):,.1f} MiB")
    print(f"  versions     {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    for title, state in (("data state", manifest.data), ("run state", manifest.trainer)):
        print(f"  {title}")
        print(textwrap.indent(yaml.dump(state, sort_keys=False, default_flow_style=None), " " * 15), end="")


def show_tensors(manifest: Manifest) -> None:
    """Print a line for every weight, whole."""
    print(f"  {'shape':>16} {'dtype':>9} {'cut along':>9}  name")
    for name, entry in manifest.parameters.items():
        print(f"  {described(entry)}  {name}")


def show_statistics(folder: Path, manifest: Manifest) -> None:
    """Print a line for every weight, whole, with the mean, standard deviation and largest magnitude of its entries."""
    from megalm.checkpoint import tensors

    print(f"  {'shape':>16} {'dtype':>9} {'cut along':>9} {'mean':>10} {'std':>10} {'max |x|':>10}  name")
    for name, tensor in tensors.read_weights(folder, manifest):
        values = tensor.float()
        statistics = (values.mean().item(), values.std(correction=0).item(), values.abs().max().item())
        numbers = " ".join(f"{number:>10.3g}" for number in statistics)
        print(f"  {described(manifest.parameters[name])} {numbers}  {name}")


def described(entry: dict[str, Any]) -> str:
    shape = " x ".join(str(size) for size in entry["shape"])
    cut = "-" if entry["shard_dim"] is None else entry["shard_dim"]
    return f"{shape:>16} {entry['dtype']:>9} {cut:>9}"


def layout(manifest: Manifest) -> str:
    return " x ".join(f"{axis} {degree}" for axis, degree in manifest.layout.items())


def mebibytes(manifest: Manifest) -> float:
    return sum(file["bytes"] for file in manifest.files.values()) / 2**20


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this command as it ends others
    main_guard(main)
