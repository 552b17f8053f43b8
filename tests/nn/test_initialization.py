"""No layout changes a weight; every name and seed has its own."""

import hashlib
import tracemalloc

import torch
from torch import nn

from megalm.nn.init import Spec, declare, draw, initialize
from megalm.nn.layers import Layers


def module(rows: int, columns: int, spec: Spec) -> nn.Module:
    layer = nn.Linear(columns, rows, bias=False)
    declare(layer.weight, spec)
    return layer


def test_slices_are_cut_from_the_same_tensor() -> None:
    for dim in (0, 1):
        whole = module(8, 12, Spec(std=0.5))
        initialize(whole, "blocks.0.attention.query", seed=3)
        for size in (2, 4):
            shards = []
            for rank in range(size):
                shape = [8, 12]
                shape[dim] //= size
                part = module(*shape, Spec(std=0.5, shard_dim=dim))
                initialize(part, "blocks.0.attention.query", 3, rank, size)
                shards.append(part.weight)
            assert torch.equal(torch.cat(shards, dim), whole.weight)
            assert not torch.equal(torch.cat(shards[::-1], dim), whole.weight)


def test_names_and_seeds_differ() -> None:
    spec = Spec(std=1.0)
    first = draw("blocks.0.x", (64, 64), spec, 0)
    assert torch.equal(first, draw("blocks.0.x", (64, 64), spec, 0))
    for other in (draw("blocks.1.x", (64, 64), spec, 0), draw("blocks.0.x", (64, 64), spec, 1)):
        assert abs((first * other).mean()) < 5 / 64


def test_distribution_and_constants() -> None:
    values = draw("x", (300, 300), Spec(std=0.02), 0)
    assert abs(values.mean()) < 5 * 0.02 / 300
    assert abs(values.std() / 0.02 - 1) < 0.02
    assert torch.equal(draw("x", (5,), Spec(value=1.0), 0), torch.ones(5))


def test_padding_rows_are_zero_and_do_not_move_the_others() -> None:
    """A table padded for another multiple holds the same vectors."""
    short, long = (draw("table", (rows, 8), Spec(std=1.0, drawn_rows=10), 0) for rows in (12, 16))
    assert torch.equal(short[:10], long[:10])
    assert not short[:10].eq(0).any()
    assert long[10:].eq(0).all()


def test_no_version_changes_a_weight() -> None:
    """Hashes written down once: a run continues under a later version, and seeds keep their meaning."""
    drawn = draw("blocks.0.x", (5, 7), Spec(std=0.02), 3), draw("table", (6, 8), Spec(std=1.0, drawn_rows=5), 0)
    hashes = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for tensor in drawn]
    assert hashes == ["467be81f550fda97", "3da159365237465f"]


def test_drawing_copies_nothing() -> None:
    tracemalloc.start()  # sees numpy's arrays; the tensor itself is torch's
    try:
        draw("x", (1000, 1000), Spec(std=1.0), 0)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_building_draws_nothing_of_torchs_own() -> None:
    before = torch.get_rng_state()
    Layers().linear(8, 4, bias=True, std=0.1)
    Layers().embedding(10, 12, 4, std=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    nn.Linear(8, 4)
    assert not torch.equal(torch.get_rng_state(), before)


def test_building_follows_the_device_in_force() -> None:
    with torch.device("meta"):
        assert Layers().linear(8, 4, bias=False, std=0.1).weight.is_meta
        assert Layers().embedding(10, 12, 4, std=0.1).weight.is_meta
        assert draw("x", (2,), Spec(std=1.0), 0).device.type == draw("x", (2,), Spec(), 0).device.type == "cpu"
