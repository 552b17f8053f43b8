"""Files are safetensors as its library has them, in both directions, and what is none is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalm.checkpoint.tensor_file import TensorFile, head

TENSORS = {
    "a": torch.arange(24.0).view(2, 3, 4),
    "b": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.arange(3).half(),
    "d": torch.arange(4),
    "e": torch.zeros(0, 2),
}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        assert sorted(file.names()) == list(TENSORS) and "a" in file and "z" not in file
        assert file.dtype("b") == "bfloat16" and file.dtype("d") == "I64"
        for name in "abce":
            tensor = TENSORS[name]
            assert file.shape(name) == tuple(tensor.shape)
            assert torch.equal(file.numbers(name, 0, tensor.numel()), tensor.flatten())
        assert torch.equal(file.numbers("b", 3, 17), TENSORS["b"].flatten()[3:17])


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    kept = {name: TENSORS[name] for name in "abc"}
    first, places = head((n, str(t.dtype).removeprefix("torch."), t.shape) for n, t in kept.items())
    data = b"".join(bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes()) for tensor in kept.values())
    (tmp_path / "x").write_bytes(first + data)
    assert places == {"a": 0, "b": 96, "c": 166}
    loaded = load_file(tmp_path / "x")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())


def headed(described: object) -> Callable[[bytes], bytes]:
    text = json.dumps(described).encode()
    return lambda whole: len(text).to_bytes(8, "little") + text + bytes(8)


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-1],
    "cut in its head": lambda whole: whole[:40],
    "longer": lambda whole: whole + b"x",
    "no head": lambda whole: b"\x04\0\0\0\0\0\0\0text",
    "a list": headed([]),
    "no shape": headed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "another shape": headed({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
    "before its data": headed({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    (tmp_path / "x").write_bytes(DAMAGED[case]((tmp_path / "x").read_bytes()))
    with pytest.raises(ValueError):
        TensorFile(tmp_path / "x")
