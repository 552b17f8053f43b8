"""Dropout is a function of the element's place in the run, with the statistics of independent draws."""

import pytest
import torch

from megalm.nn.dropout import AttentionDropout, Dropout, mix, site_key, token_rows

MASK64 = 2**64 - 1


def splitmix(key: int, coordinate: int) -> int:
    """The hash in Python's unbounded integers."""
    x = ((coordinate + 1) * 0x9E3779B97F4A7C15 + key) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def test_hash_is_splitmix() -> None:
    coordinates = torch.tensor([0, 1, 2, 12345678901234, 2**62])
    for key in (0, 1, -5, site_key(3, "blocks.0.attention")):
        hashed = mix(key, coordinates)
        assert [value & MASK64 for value in hashed.tolist()] == [splitmix(key, c) for c in coordinates.tolist()]


def layer(p: float = 0.25, seed: int = 1, site: str = "blocks.0.attention") -> Dropout:
    return Dropout(p, seed, site)


ROWS = token_rows(torch.zeros(4, 64, dtype=torch.int64), torch.tensor([0, 1, 2, 9]), row_length=64)


def test_statistics() -> None:
    x = torch.ones(256, 400)
    for p in (0.1, 0.5, 0.9):
        out = layer(p)(x, ROWS)
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
        kept = out > 0
        deviation = (p * (1 - p)) ** 0.5
        assert abs(kept.float().mean() - (1 - p)) < 5 * deviation / x.numel() ** 0.5
        # neighbours in either direction, rows and columns are uncorrelated
        centred = (kept.float() - (1 - p)) / deviation
        for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
            assert abs(product.mean()) < 5 / product.numel() ** 0.5
        assert (kept.float().mean(0) - (1 - p)).abs().max() < 6 * deviation / 256**0.5
        assert (kept.float().mean(1) - (1 - p)).abs().max() < 6 * deviation / 400**0.5


def test_same_place_same_choice_whatever_the_slicing() -> None:
    x = torch.randn(256, 32)
    whole = layer()(x, ROWS)
    assert torch.equal(whole, layer()(x, ROWS))
    halves = [layer()(x[rows], ROWS[rows]) for rows in (slice(0, 128), slice(128, 256))]
    assert torch.equal(whole, torch.cat(halves))
    order = torch.randperm(256)
    assert torch.equal(whole[order], layer()(x[order], ROWS[order]))


@pytest.mark.parametrize("other", [layer(seed=2), layer(site="blocks.1.attention")])
def test_other_seeds_and_sites_choose_otherwise(other: Dropout) -> None:
    x = torch.ones(256, 32)
    agreement = ((layer()(x, ROWS) > 0) == (other(x, ROWS) > 0)).float().mean()
    assert abs(agreement - (0.75**2 + 0.25**2)) < 0.03


def test_rows_are_known_by_sample_and_place() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])  # two packed documents
    assert token_rows(positions, torch.tensor([7]), 10).tolist() == [70, 71, 72, 73, 74]


def test_evaluation_and_zero_cost_nothing() -> None:
    x = torch.ones(3, 3)
    assert layer(0.0)(x, None) is x
    assert layer(0.5).eval()(x, None) is x


def test_gradient_is_the_mask() -> None:
    x = torch.randn(256, 8, dtype=torch.bfloat16, requires_grad=True)
    out = layer()(x, ROWS)
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad, layer()(torch.ones_like(x), ROWS))


def test_attention_weights() -> None:
    weights = torch.ones(2, 4, 16, 24)

    def drop(samples: list[int], first_head: int, weights: torch.Tensor) -> torch.Tensor:
        return AttentionDropout(0.5, 11, torch.tensor(samples), first_head).apply(weights)

    whole = drop([3, 8], 0, weights)
    assert abs((whole > 0).float().mean() - 0.5) < 0.05
    assert torch.equal(whole[1:], drop([8], 0, weights[1:]))
    assert torch.equal(whole[:, 2:], drop([3, 8], 2, weights[:, 2:]))
    assert torch.equal(whole[:, :, :9, :7], drop([3, 8], 0, weights[:, :, :9, :7]))
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[..., 0, :], whole[..., 1, :])
