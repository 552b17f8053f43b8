"""A Hugging Face folder: config.json and safetensors files, read by parts and written tensor by tensor."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint.tensor_file import TensorFile, head
from megalm.errors import MegalmError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_BLOCK = 1 << 24
"""Bytes written at a time."""

Item = TypeVar("Item")


def read_json(path: Path) -> dict[str, Any]:
    """Raises MegalmError if it is missing or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MegalmError(f"{path.parent} is not a Hugging Face folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise MegalmError(f"{path} cannot be read ({error}): copy the folder again") from None
    if not isinstance(content, dict):
        raise MegalmError(f"{path} is not a JSON object: copy the folder again")
    return content


class Weights:
    """The tensors of a folder. A context manager.

    Raises MegalmError if files are missing, damaged or not safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, TensorFile] = {}
        self._places = self._find()

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _find(self) -> dict[str, str]:
        """Name of a tensor -> the file it is in."""
        if (self.folder / WEIGHTS_FILE).exists():  # as transformers does, whatever an index left beside it says
            return dict.fromkeys(self._open(WEIGHTS_FILE).names(), WEIGHTS_FILE)
        index = self.folder / INDEX_FILE
        if not index.exists():
            other = next((f" ({path.name} is not read)" for path in sorted(self.folder.glob("*.bin"))), "")
            raise MegalmError(
                f"{self.folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{other}: save the model as safetensors"
            )
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise MegalmError(f"{index} has no weight_map: copy the folder again")
        missing = sorted({file for file in places.values() if not (self.folder / file).exists()})
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise MegalmError(f"{self.folder / missing[0]} is missing{more}: copy the folder again")
        return dict(places)

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = self._stack.enter_context(TensorFile(path))
            except (OSError, ValueError) as error:
                raise MegalmError(f"{path} cannot be read ({error}): copy the folder again") from None
        return self._files[file]

    def names(self) -> list[str]:
        return list(self._places)

    def _holder(self, name: str) -> TensorFile:
        """The file of a tensor."""
        file = self._places[name]
        holder = self._open(file)
        if name not in holder:
            raise MegalmError(f"{self.folder / file} has no tensor {name}: copy the folder again")
        return holder

    def shape(self, name: str) -> tuple[int, ...]:
        return self._holder(name).shape(name)

    def dtype(self, name: str) -> str:
        """Name of its dtype; of one that is not a floating-point number of 16 or 32 bits, safetensors' own."""
        return self._holder(name).dtype(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Its rows first..last, as they are kept."""
        width = math.prod(self.shape(name)[1:])
        flat = self._holder(name).numbers(name, first * width, last * width)
        return flat.view(last - first, *self.shape(name)[1:])

    def whole(self, name: str) -> Tensor:
        """All of it, fp32."""
        return self.rows(name, 0, self.shape(name)[0]).float()


# ---- writing ----


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * getattr(torch, self.dtype).itemsize


def shards(planned: Iterable[Planned], most: int) -> dict[str, list[Planned]]:
    """File -> its tensors, in order; a file has at most `most` bytes, or one tensor."""
    parts: list[list[Planned]] = [[]]
    used = 0
    for tensor in planned:
        if parts[-1] and used + tensor.bytes > most:
            parts.append([])
            used = 0
        parts[-1].append(tensor)
        used += tensor.bytes
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_index(folder: Path, files: Mapping[str, list[Planned]]) -> None:
    if len(files) > 1:
        total = sum(tensor.bytes for part in files.values() for tensor in part)
        places = {tensor.name: file for file, part in files.items() for tensor in part}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is whole or absent."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


class Budget:
    """Threads that work on tensors hold at most `most` bytes of them together."""

    def __init__(self, most: int):
        self._free = self._most = most
        self._condition = Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        count = min(count, self._most)
        with self._condition:
            self._condition.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._condition:
                self._free += count
                self._condition.notify_all()


def each(work: Callable[[Item], None], items: Iterable[Item], workers: int) -> None:
    """Call work(item) for every item, in threads; the first exception ends it."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_shard(
    path: Path, tensors: list[Planned], make: Callable[[str], Tensor], budget: Budget, workers: int
) -> None:
    """Write one safetensors file, synced and whole or absent, its tensors made by `make` in threads."""
    first, places = head((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(first)
        file.flush()

        def write(tensor: Planned) -> None:
            with budget.hold(int(np.prod(tensor.shape))):
                made = make(tensor.name).contiguous()
                assert tuple(made.shape) == tensor.shape, tensor.name
                data = made.view(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), _BLOCK):
                    _write_at(file.fileno(), data[start : start + _BLOCK], len(first) + places[tensor.name] + start)

        each(write, tensors, workers)
        os.fsync(file.fileno())
    partial.replace(path)


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB` or a number. Raises MegalmError for anything else, or for none."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in units or not (size := int(float(match[1]) * units[match[2].upper()])):
        raise MegalmError(f"{text} is not a size: write it as 5GB or 500MB")
    return size
