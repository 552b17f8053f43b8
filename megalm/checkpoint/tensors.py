"""The tensors of a checkpoint: stretches of them in safetensors files of each rank, found again by their place.

A tensor is the concatenation of T slices along its shard_dim (T = 1 if it has none), and a slice, flattened, is cut
into stretches wherever ZeRO happened to cut it. The manifest says where each stretch lies. So a checkpoint has no
layout of its own: any rank of any other layout reads just the stretches of the tensors that it holds.
"""

import errno
import hashlib
import math
import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.tensor_file import TensorFile, head
from megalm.errors import MegalmError

WEIGHT = "weight"
_BLOCK = 1 << 24
"""Bytes written and hashed at a time."""
_MOST_OPEN = 256
"""Files that a reader has open at once, a quarter of the 1,024 that a process usually may have."""


class Stretch(Protocol):
    """Numbers start..start+count of the flattened slice `tensor_rank` of the tensor `name` (parallel.state.Piece)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def shard_dim(self) -> int | None: ...
    @property
    def tensor_rank(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...


def file_name(rank: int, kind: str = WEIGHT) -> str:
    """Weights are apart from moments, which are read only to go on training."""
    return f"{'weights' if kind == WEIGHT else 'moments'}-rank-{rank:05d}.safetensors"


def weight_files(manifest: Manifest) -> list[str]:
    """Every file of a checkpoint that read_weights() opens."""
    return [name for name in manifest.files if name.startswith("weights-")]


def _key(name: str, kind: str, tensor_rank: int, start: int) -> str:
    return f"{name}/{kind}/{tensor_rank}/{start}"


class Snapshot:
    """A copy in host memory of what one rank holds, which can be written while training goes on.

    Its memory is kept from one save to the next: to get new pages from the system takes longer than to write them.
    """

    def __init__(self, numbers: int, *, pinned: bool):
        """numbers: fp32 numbers to make room for. pinned: page-locked, for copies from a GPU."""
        self._flat = torch.empty(numbers, pin_memory=pinned)
        self._places: dict[str, tuple[int, int]] = {}
        self.table: dict[str, dict[str, Any]] = {}
        """The manifest's entries for these stretches, of this rank."""

    def touch(self) -> None:
        """Have the system hand out the memory now, so that the first copy need not wait for it."""
        self._flat.zero_()

    def take(self, stretches: Iterable[Stretch], rank: int, dtype: str) -> None:
        """Copy stretches; they may change as soon as this returns. dtype: of the weights in the forward pass."""
        self._places, self.table = {}, {}
        used, devices = 0, set()
        for stretch in stretches:
            for kind, tensor in stretch.tensors.items():
                place = used, used + tensor.numel()
                if place[1] > self._flat.numel():  # a first step made moments that were not there before
                    self._grow(place[1])
                self._flat[place[0] : place[1]].copy_(tensor, non_blocking=True)
                self._places[_key(stretch.name, kind, stretch.tensor_rank, stretch.start)] = place
                devices.add(tensor.device)
                used = place[1]
            entry = self.table.setdefault(
                stretch.name,
                {
                    "shape": list(stretch.shape),
                    "shard_dim": stretch.shard_dim,
                    "dtype": dtype,
                    "kinds": sorted(stretch.tensors),
                    "pieces": [],
                },
            )
            entry["pieces"].append([rank, stretch.tensor_rank, stretch.start, stretch.count])
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def _grow(self, numbers: int) -> None:
        larger = torch.empty(max(numbers, 2 * self._flat.numel()), pin_memory=self._flat.is_pinned())
        larger[: self._flat.numel()] = self._flat
        self._flat = larger

    def write(self, folder: Path, rank: int) -> dict[str, dict[str, Any]]:
        """Write the copy as safetensors files, synced; returns the manifest's entries for them.

        Written here and not by safetensors, in blocks, so that checksums are taken on the way and training's thread is
        never kept from Python for long.
        """
        files: dict[str, dict[str, tuple[int, int]]] = {}
        for key, place in self._places.items():
            files.setdefault(file_name(rank, key.split("/")[1]), {})[key] = place
        return {name: self._write(folder / name, places) for name, places in files.items()}

    def _write(self, path: Path, places: dict[str, tuple[int, int]]) -> dict[str, Any]:
        first, _ = head((key, "float32", [stop - start]) for key, (start, stop) in places.items())
        size, data = self._flat.element_size(), self._flat.numpy().view(np.uint8).data
        digest = hashlib.blake2b(digest_size=16)
        with path.open("wb") as file:
            stretches = (data[start * size : stop * size] for start, stop in places.values())
            blocks: Iterator[bytes | memoryview] = chain([first], _blocks(stretches))
            for block in blocks:
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
            return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


def _blocks(stretches: Iterable[memoryview]) -> Iterator[memoryview]:
    for stretch in stretches:
        yield from (stretch[start : start + _BLOCK] for start in range(0, len(stretch), _BLOCK))


def merge(tables: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The manifest's table of parameters from every rank's."""
    merged: dict[str, dict[str, Any]] = {}
    for table in tables:
        for name, entry in table.items():
            whole = merged.setdefault(name, {**entry, "pieces": []})
            assert all(whole[key] == entry[key] for key in entry if key != "pieces"), name
            whole["pieces"] += entry["pieces"]
    for name, entry in merged.items():
        entry["pieces"].sort(key=lambda piece: piece[1:])
        ends: dict[int, int] = {}
        for _, tensor_rank, start, count in entry["pieces"]:
            assert start == ends.get(tensor_rank, 0), (
                f"{name}: numbers of slice {tensor_rank} were saved twice or never"
            )
            ends[tensor_rank] = start + count
        held, size = sum(ends.values()), math.prod(entry["shape"])
        assert held == size and len({*ends.values()}) == 1, f"{name}: {held} of {size} numbers were saved"
    return merged


class Reader:
    """Reads any part of any tensor of a checkpoint, whatever layout wrote it, in any threads. A context manager.

    However many ranks wrote it, few of their files are open at once: what was read longest ago is let go first.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._parameters = manifest.parameters
        self._tensor_size = manifest.layout["tensor"]
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = _MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(soft // 4, _MOST_OPEN))
        self._files: OrderedDict[Path, TensorFile] = OrderedDict()
        self._lock = Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole tensor, fp32."""
        entry = self._parameters[name]
        return self.stretch(name, kind, None, 0, 1, 0, math.prod(entry["shape"])).view(entry["shape"])

    def stretch(
        self, name: str, kind: str, shard_dim: int | None, tensor_rank: int, tensor_size: int, start: int, count: int
    ) -> Tensor:
        """Numbers start..start+count of the flattened slice `tensor_rank` of `tensor_size` along shard_dim, fp32.

        Reads little more than that: from a tensor that is cut along its columns, the rows that the stretch touches.
        Raises MegalmError if a file cannot be read.
        """
        entry = self._parameters[name]
        if kind not in entry["kinds"]:
            return torch.zeros(count)  # saved before the optimizer's first step
        shape, theirs = entry["shape"], entry["shard_dim"]
        assert shard_dim is None or theirs is None or shard_dim == theirs, name
        dim = theirs if shard_dim is None else shard_dim
        # Whatever the dimension, the tensor is a matrix [rows, columns] that is cut along its columns.
        rows = math.prod(shape[:dim]) if dim is not None else 1
        columns = math.prod(shape) // rows
        width = columns // (1 if shard_dim is None else tensor_size)
        source_width = columns // (1 if theirs is None else self._tensor_size)
        left = tensor_rank * width
        if rows == 1:
            first, last, left, right = 0, 1, left + start, left + start + count
        else:
            first, last, right = start // width, -(-(start + count) // width), left + width
        block = torch.empty(last - first, right - left)
        for slice_rank in range(left // source_width, -(-right // source_width)):
            edge = slice_rank * source_width
            here, there = max(left, edge), min(right, edge + source_width)
            part = block[:, here - left : there - left]
            if rows == 1:
                part.copy_(self._slice(name, kind, slice_rank, here - edge, there - edge)[None])
            else:
                numbers = self._slice(name, kind, slice_rank, first * source_width, last * source_width)
                part.copy_(numbers.view(-1, source_width)[:, here - edge : there - edge])
        skipped = 0 if rows == 1 else start - first * width
        return block.view(-1)[skipped : skipped + count]

    def _slice(self, name: str, kind: str, slice_rank: int, start: int, stop: int) -> Tensor:
        """Numbers start..stop of a flattened slice, from the stretches it was saved in."""
        numbers, found = torch.empty(stop - start), 0
        for rank, piece_rank, piece_start, count in self._parameters[name]["pieces"]:
            here, there = max(start, piece_start), min(stop, piece_start + count)
            if piece_rank == slice_rank and here < there:
                key = _key(name, kind, slice_rank, piece_start)
                saved = self._file(rank, kind).numbers(key, here - piece_start, there - piece_start)
                numbers[here - start : there - start] = saved
                found += there - here
        assert found == stop - start, f"{name}: {found} of {stop - start} numbers asked for are in the checkpoint"
        return numbers

    def _file(self, rank: int, kind: str) -> TensorFile:
        path = self._folder / file_name(rank, kind)
        with self._lock:
            if path not in self._files:
                while len(self._files) >= self._limit:
                    self._files.popitem(last=False)  # not closed here: another thread may be reading it
                self._files[path] = _open(path)
            self._files.move_to_end(path)
            return self._files[path]


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise MegalmError(f"cannot open {path}: too many files are open, raise the limit (ulimit -n)") from None
        raise MegalmError(
            f"{path} cannot be read ({error}): the checkpoint is damaged, choose another one of the run"
        ) from None


def read_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """(full name, whole tensor) of every weight, as in the forward pass; memory is that of one tensor."""
    with Reader(folder, manifest) as reader:
        for name, entry in manifest.parameters.items():
            yield name, reader.whole(name).to(getattr(torch, entry["dtype"]))
