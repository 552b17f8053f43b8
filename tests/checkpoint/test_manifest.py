"""What a manifest says comes back, and what is no manifest is refused by name."""

import json
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import pytest

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError

MANIFEST = Manifest(
    step=7,
    tokens=1_000_000_000_000,
    config={"model": {"rope_scaling": None, "norm_eps": 1e-05}},
    layout={"pipeline": 2, "data": 1, "tensor": 2},
    data={"samples": 3, "blend": {"weights": [0.1, 0.9]}},
    trainer={"Anomalies": {"mean": 1 / 3}},
    optimizer={"updates": 7, "loss_scale": {}},
    parameters={"norm.norm.weight": {"shape": [8], "shard_dim": None, "pieces": [[0, 0, 0, 8]]}},
    files={"a": {"bytes": 1, "blake2b": "00"}},
    versions={"megalm": "0.1.0"},
)


def test_round_trip(tmp_path: Path) -> None:
    manifests.write(tmp_path, MANIFEST)
    assert manifests.read(tmp_path) == MANIFEST


def test_a_folder_without_one_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match=f"{tmp_path} is not a checkpoint: it has no manifest.json"):
        manifests.read(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b'{"step": 7'], ids=["empty", "brace", "binary", "cut"]
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / manifests.NAME).write_bytes(content)
    with pytest.raises(MegalmError, match="manifest.json cannot be read .*: choose another checkpoint"):
        manifests.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"format": 2},
        asdict(MANIFEST) | {"blake2b": "", "format": 1},
        asdict(MANIFEST) | {"blake2b": "", "more": 1},
        {key: value for key, value in asdict(MANIFEST).items() if key != "tokens"} | {"blake2b": ""},
    ],
    ids=["list", "empty", "format", "unknown field", "missing field"],
)
def test_another_format_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / manifests.NAME).write_text(json.dumps(content))
    with pytest.raises(MegalmError, match="is not a manifest of format 2, it was written by another version of megalm"):
        manifests.read(tmp_path)


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    """Also one that leaves valid JSON with another number in it."""
    manifests.write(tmp_path, MANIFEST)
    path = tmp_path / manifests.NAME
    right = path.read_bytes()
    blank = 0
    for place in range(len(right)):
        for bit in (0, 4):
            wrong = bytearray(right)
            wrong[place] ^= 1 << bit
            path.write_bytes(wrong)
            try:
                assert manifests.read(tmp_path) == MANIFEST  # white space became other white space, or a 7e0 a 7E0
                blank += 1
            except MegalmError:
                pass
    assert blank < len(right) // 50


def test_checksum_is_blake2b(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # more than one read
    (tmp_path / "file").write_bytes(content)
    assert manifests.checksum(tmp_path / "file") == blake2b(content, digest_size=16).hexdigest()
