"""The two conversions. Each writes a hidden folder beside its output, which takes its name when all of it is proved."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.checkpoint import tensors
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.tensors import Snapshot
from megalm.convert import architectures, gate, tokenizer_files
from megalm.convert.architectures import Architecture, Entry
from megalm.convert.folder import (
    CONFIG_FILE,
    Budget,
    Planned,
    each,
    parse_size,
    shards,
    write_index,
    write_json,
    write_shard,
)
from megalm.convert.gate import Verdict
from megalm.convert.mapping import label_keys
from megalm.convert.sources import CheckpointSource, FolderSource
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.chat import Chat, read_template, trained_template
from megalm.tokenizer.load import load as load_tokenizer

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PLAN_FILE = ".conversion.json"
"""In an unfinished folder: what is being converted into it, so that the same command goes on there."""

Report = Callable[[str, int, int], None]
"""Called with what is being done, the bytes of it that are done, and all of them."""


def silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Converted:
    """bytes: of the weights. verdict: of the gate, or None where it was skipped. notes: what a user should know."""

    architecture: Architecture
    config: ModelConfig
    bytes: int
    verdict: Verdict | None
    notes: list[str]


def to_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: Path | None = None,
    verify: bool = True,
    workers: int = 4,
    report: Report = silent,
) -> Converted:
    """Write a checkpoint, whatever layout wrote it, as a folder that transformers loads.

    checkpoint: a run folder (its newest), or a checkpoint folder. dtype: of the weights, bf16, fp16 or fp32; by default
    that of the forward pass they were trained in. tokenizer: its path, where it has moved since the run. verify:
    False skips the gate. Memory is a few times that of the largest tensor. A conversion that was interrupted goes on
    where it was.

    Raises MegalmError if the checkpoint is missing or damaged, if no architecture computes its model, or if the gate
    finds a difference; then there is no output.
    """
    with CheckpointSource(checkpoint) as source:
        config, manifest = source.config, source.manifest
        architecture = architectures.of_model(config)
        path = Path(tokenizer or manifest.config["data"]["tokenizer"])
        loaded = _tokenizer(path, source)
        limit = parse_size(max_shard_size)
        refuse_existing(output)
        verify_weights(source, workers, report)
        rounded = {name: DTYPES[dtype] if dtype else kept for name, kept in source.dtypes.items()}
        shapes = architectures.their_shapes(architecture, config)
        entries = {entry.theirs: entry for entry in architectures.entries(architecture, config)}
        planned = [Planned(name, shapes[name], rounded[entry.ours[0]]) for name, entry in entries.items()]
        files = shards(planned, limit)

        def weight(name: str) -> Tensor:
            return _round(source.whole(name), rounded[name], name)

        plan = {"checkpoint": manifest.files, "dtype": dtype, "max_shard_size": limit, "megalm": version("megalm")}
        with unfinished(output, plan) as partial:
            _write_shards(partial, files, entries, config, weight, workers, report)
            blend = manifest.data.get("blend", {})
            trained_with = trained_template(blend)
            stops = _ends_of_turns(loaded, trained_with or read_template(path))
            _write_config(partial, architecture, config, loaded, rounded["embedding.table.weight"], blend, stops)
            notes = tokenizer_files.export(path, loaded, partial, config.max_position_embeddings, trained_with)
            verdict = None
            if verify:
                report("comparing with transformers", 0, 1)
                verdict = gate.judge(config, lambda name: weight(name).float(), loaded, partial)
        written = sum(tensor.bytes for tensor in planned)
        return Converted(architecture, config, written, verdict, notes + (verdict.notes if verdict else []))


def from_hf(
    folder: Path,
    output: Path,
    *,
    tokenizer: Path | None = None,
    verify: bool = True,
    workers: int = 4,
    report: Report = silent,
) -> Converted:
    """Write a Hugging Face folder as a checkpoint of step 0, without moments, that load_model and model.init_from read.

    tokenizer: its path, where the folder has none. verify: as for to_hf. A conversion that was interrupted goes on
    where it was.

    Raises MegalmError if the folder is not whole or of an architecture megalm has not, or if the gate finds a
    difference; then there is no output.
    """
    path = tokenizer or folder
    with FolderSource(folder) as source:
        refuse_existing(output)
        with unfinished(output, {"folder": _state(folder), "megalm": version("megalm")}) as partial:
            shutil.rmtree(partial / "tokenizer", ignore_errors=True)
            loaded = tokenizer_files.restore(path, partial / "tokenizer")
            assert source.config.vocab_size is not None
            if loaded.vocab_size > source.config.vocab_size:
                raise MegalmError(
                    f"the tokenizer at {path} has {loaded.vocab_size} ids and the model of {folder} has "
                    f"{source.config.vocab_size}: give the tokenizer it was trained with"
                )
            described = _write_checkpoint(source, partial, output, loaded, workers, report)
            verdict = None
            if verify:
                report("comparing with transformers", 0, 1)
                with CheckpointSource(partial) as copy:
                    verdict = gate.judge(source.config, copy.whole, loaded, folder)
            for description in described:
                description.unlink()
        size = 4 * sum(map(math.prod, source.shapes.values()))
        return Converted(source.architecture, source.config, size, verdict, verdict.notes if verdict else [])


def _state(folder: Path) -> dict[str, Any]:
    """What tells a folder from another, and from itself when it has changed, without reading all of it."""
    files = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {"": str(folder.resolve())} | {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}


def refuse_existing(output: Path) -> None:
    if output.exists():
        raise MegalmError(f"{output} exists: name another output folder, or remove it")


def _tokenizer(path: Path, source: CheckpointSource) -> Tokenizer:
    """The tokenizer at `path`, if it is the one the model was trained with."""
    if not path.exists():
        raise MegalmError(
            f"the tokenizer of checkpoint {source.path} is not at {path}: work in the folder where the run was "
            "started, or give --tokenizer"
        )
    loaded = load_tokenizer(path)
    trained_with = source.manifest.data.get("blend", {}).get("tokenizer")  # its fingerprint, as the loader wrote it
    assert source.config.vocab_size is not None
    if trained_with not in (None, loaded.fingerprint) or loaded.vocab_size > source.config.vocab_size:
        raise MegalmError(
            f"the tokenizer at {path} is not the one that checkpoint {source.path} was trained with: "
            f"{loaded.way_to(trained_with, 'give that one as --tokenizer')}"
        )
    return loaded


def verify_weights(source: CheckpointSource, workers: int, report: Report) -> None:
    """Read every byte of a checkpoint's weights. Raises MegalmError if one was altered."""
    sizes = {name: source.manifest.files[name]["bytes"] for name in source.files}
    count, faults = _Count("verifying the checkpoint", sum(sizes.values()), report), []

    def check(name: str) -> None:
        faults.extend(manifests.faults(source.path, source.manifest, [name]))
        count.add(sizes[name])

    each(check, source.files, workers)
    checkpoints.refuse_damaged(source.path, sorted(faults))


class _Count:
    """Bytes done by several threads."""

    def __init__(self, what: str, total: int, report: Report):
        self._what, self._total, self._report = what, total, report
        self._done, self._lock = 0, Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._report(self._what, self._done, self._total)


@contextmanager
def unfinished(output: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """A hidden folder that becomes `output` if nothing is raised.

    What a user can cause removes it. Anything else, a kill or a full disk included, leaves it: the next conversion of
    the same plan goes on in it, one of another plan starts anew.
    """
    partial = output.parent / f".{output.name}.partial"
    described = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    mark = partial / PLAN_FILE
    try:
        if not (mark.exists() and mark.read_text() == described):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            mark.write_text(described)
        yield partial
        mark.unlink()
        partial.rename(output)
    except MegalmError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise MegalmError(
            f"{output} could not be written ({error.strerror or error}): make room, or choose another folder; the same "
            "command goes on where it was"
        ) from error


def _round(weight: Tensor, dtype: str, name: str) -> Tensor:
    """Raises MegalmError for a weight that is not finite, or would not be."""
    rounded = weight.to(getattr(torch, dtype))
    if not rounded.isfinite().all():
        why = (
            "is not finite: choose another checkpoint"
            if not weight.isfinite().all()
            else (f"overflows in {dtype}: choose --dtype bf16 or fp32")
        )
        raise MegalmError(f"the weight {name} {why}")
    return rounded


def _write_shards(
    folder: Path,
    files: dict[str, list[Planned]],
    entries: dict[str, Entry],
    config: ModelConfig,
    weight: Callable[[str], Tensor],
    workers: int,
    report: Report,
) -> None:
    """Every file that an interrupted conversion has not left whole, its tensors in threads."""
    every = [tensor for part in files.values() for tensor in part]
    count = _Count("writing", sum(tensor.bytes for tensor in every), report)
    budget = Budget(2 * max(math.prod(tensor.shape) for tensor in every))

    def make(name: str) -> Tensor:
        entry = entries[name]
        return entry.mapping.export([weight(ours) for ours in entry.ours], config)

    for file, part in files.items():
        if not (folder / file).exists():
            write_shard(folder / file, part, make, budget, workers)
        count.add(sum(tensor.bytes for tensor in part))
    write_index(folder, files)


def _ends_of_turns(tokenizer: Tokenizer, template: str | None) -> list[int]:
    """Ids that end the assistant's turn in a chat template, other than the end of a document."""
    if template is None:
        return []
    return sorted(Chat(tokenizer, template).ends - {tokenizer.eos_id})


def _write_config(
    folder: Path,
    architecture: Architecture,
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
    task: Mapping[str, Any],
    stops: list[int],
) -> None:
    """task: what a task with a head of its own kept in the checkpoint (sft.heads.HeadTask.facts). stops: ids that end
    an answer, beside the end of a document."""
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    # A class is read at the last token that is no padding, so transformers must know padding; no row ends with an end.
    if tokenizer.pad_id != tokenizer.eos_id or config.head == "sequence_classification":
        ends["pad_token_id"] = tokenizer.pad_id
    written = architecture.write(config) | ends | {"torch_dtype": dtype}
    if config.head == "language_model":
        generation = ends | ({"eos_token_id": [tokenizer.eos_id, *stops]} if stops else {})
        write_json(folder / "generation_config.json", {key: i for key, i in generation.items() if i is not None})
    elif task.get("labels"):
        written |= label_keys(task["labels"])
    if config.head == "sequence_classification":
        written["problem_type"] = task.get("problem_type") or "single_label_classification"
    write_json(folder / CONFIG_FILE, written)


# ---- into a checkpoint ----


@dataclass(frozen=True)
class _Whole:
    """A whole weight, as a checkpoint's stretch."""

    name: str
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    shard_dim: int | None = None
    tensor_rank: int = 0
    start: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _write_checkpoint(
    source: FolderSource, folder: Path, output: Path, tokenizer: Tokenizer, workers: int, report: Report
) -> list[Path]:
    """The checkpoint, but for the files that an interrupted conversion left whole.

    Each of its files holds about as much as the largest tensor does, so that a thread needs memory for one file. Beside
    each lies, and is returned, a file with its part of the manifest: it says that the file is whole, until all of the
    checkpoint is.
    """
    manifest = Manifest(
        step=0,
        tokens=0,
        config={
            "model": source.config.model_dump(),
            "data": {"tokenizer": str(output.resolve() / "tokenizer")},
        },
        layout={"pipeline": 1, "data": 1, "tensor": 1},
        data={"blend": {"tokenizer": tokenizer.fingerprint, **_labels(source)}},
        trainer={},
        optimizer={"updates": 0, "loss_scale": {}},
        parameters={},
        files={},
        versions={name: version(name) for name in ("megalm", "torch")},
    )
    sizes = {entry.theirs: sum(math.prod(source.shapes[name]) for name in entry.ours) for entry in source.entries}
    largest, groups, used = max(sizes.values()), list[list[Entry]](), 0
    for entry in source.entries:
        if not groups or used + sizes[entry.theirs] > largest:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += sizes[entry.theirs]
    count = _Count("writing", 4 * sum(sizes.values()), report)
    budget = Budget(2 * largest)
    descriptions = [folder / f"{tensors.file_name(rank)}.json" for rank in range(len(groups))]

    def write(rank: int) -> None:
        group = groups[rank]
        numbers = sum(sizes[entry.theirs] for entry in group)
        if not descriptions[rank].exists():
            with budget.hold(numbers):
                snapshot = Snapshot(numbers, pinned=False)
                snapshot.take(_stretches(source, group), rank, "float32")
                for name, entry in snapshot.table.items():
                    entry["dtype"] = source.dtypes[name]
                written = snapshot.write(folder, rank)
            write_json(descriptions[rank], {"files": written, "parameters": snapshot.table})
        count.add(4 * numbers)

    each(write, range(len(groups)), workers)
    described = [json.loads(path.read_text()) for path in descriptions]
    files = {name: entry for part in described for name, entry in part["files"].items()}
    parameters = tensors.merge(part["parameters"] for part in described)
    ordered = {name: parameters[name] for name in source.shapes}
    manifests.write(folder, replace(manifest, files=files, parameters=ordered))
    return descriptions


def _labels(source: FolderSource) -> dict[str, Any]:
    """What a task with a head of its own keeps in a checkpoint, from config.json."""
    if source.config.head == "language_model":
        return {}
    names = source.described.get("id2label") or {}
    labels = [names[number] for number in sorted(names, key=int)]
    return {"labels": labels, "problem_type": source.described.get("problem_type")}


def _stretches(source: FolderSource, group: list[Entry]) -> Iterator[_Whole]:
    for entry in group:
        for name, weight in zip(entry.ours, source.restore(entry), strict=True):
            if not weight.isfinite().all():
                raise MegalmError(f"the weight {name} of {source.path} is not finite: copy the folder again")
            yield _Whole(name, source.shapes[name], {"weight": weight.reshape(-1)})
