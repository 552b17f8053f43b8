"""Safetensors files: the head that describes the tensors behind it, and reading of any part of them.

They are read here and not by the library of that name, which maps whole files: a map counts as memory of the process
where that is limited, and in what tools report.
"""

import json
import math
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Name of a dtype -> what the format calls it."""
_DTYPES = {code: getattr(torch, name) for name, code in CODES.items()}
_BLOCK = 1 << 22
"""Bytes read at a time."""


def head(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where behind them each tensor begins. tensors: (name, dtype, shape), in order."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, used = {}, 0
    for name, dtype, shape in tensors:
        places[name] = used
        used += math.prod(shape) * getattr(torch, dtype).itemsize
        described[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [places[name], used]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


class TensorFile:
    """A file whose tensors are read as they are asked for, by several threads if need be. A context manager."""

    def __init__(self, path: Path):
        """Raises OSError, or ValueError if it is no such file or not all of it."""
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)  # without `with`, when the last thread that reads it is done
        try:
            self._begin, self._tensors = self._read_head()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read_head(self) -> tuple[int, dict[str, Any]]:
        size = os.fstat(self._file.fileno()).st_size
        begin = 8 + int.from_bytes(self._read(0, 8), "little")
        if begin > size:
            raise ValueError("it ends within its head")
        tensors = json.loads(self._read(8, begin - 8))
        if not isinstance(tensors, dict):
            raise ValueError("its head describes no tensors")
        tensors.pop("__metadata__", None)
        try:
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            for name, entry in tensors.items():
                start, stop = entry["data_offsets"]
                dtype = _DTYPES.get(entry["dtype"])
                if start < 0 or (dtype and stop - start != math.prod(entry["shape"]) * dtype.itemsize):
                    raise ValueError(f"its head describes {name} wrongly")
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"its head is damaged ({type(error).__name__})") from None
        if begin + end != size:
            raise ValueError(f"it holds {size} bytes instead of {begin + end}")
        return begin, tensors

    def _read(self, place: int, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = os.pread(self._file.fileno(), count - len(data), place + len(data))
            if not more:
                raise ValueError("it ends too early")
            data += more
        return data

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> str:
        """Name of its dtype; of one that is not a floating-point number of 16 or 32 bits, the format's own."""
        code = self._tensors[name]["dtype"]
        return next((dtype for dtype, known in CODES.items() if known == code), code)

    def numbers(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers start..stop of the flattened tensor, as they are kept."""
        entry = self._tensors[name]
        numbers = torch.empty(stop - start, dtype=_DTYPES[entry["dtype"]])
        bytes_there = numbers.view(torch.uint8).numpy().data
        place = self._begin + entry["data_offsets"][0] + start * numbers.itemsize
        for at in range(0, len(bytes_there), _BLOCK):
            block = bytes_there[at : at + _BLOCK]
            block[:] = self._read(place + at, len(block))
        return numbers
