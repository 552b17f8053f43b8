"""Dropout without a random state: what is dropped is a function of (seed, site, where the element is).

The same elements are dropped under every parallel layout, in every micro-batching and when activations are
recomputed, because an element is known by its sample's number in the order of training and not by the rank or the
moment that computes it. The function is the finaliser of SplitMix64 (Steele et al. 2014), chained over coordinates.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # int64 arithmetic wraps, so constants are written as signed numbers
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_UNIT = 2**32
_BITS = 24
"""Of a number that EmbeddingNoise draws."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift that fills with zeros (torch's own repeats the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(key: Tensor | int, coordinate: Tensor) -> Tensor:
    """Hash of (key, coordinate), broadcast, int64."""
    x = (coordinate + 1) * _GOLDEN + key
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def site_key(seed: int, site: str) -> int:
    """The key of one place in the network, as a signed 64-bit number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{site}".encode(), digest_size=8).digest(), "little", signed=True)


def _kept(hashed: Tensor, p: float) -> Tensor:
    return _shift_right(hashed, 32) >= round(p * _UNIT)


def token_rows(positions: Tensor, sample_ids: Tensor, row_length: int) -> Tensor:
    """A number for every token of the run: positions [batch, seq], sample_ids [batch] -> [tokens].

    It is sample x row_length + place in the row. The place is not `positions`, which restart in packed documents.
    """
    places = torch.arange(positions.shape[1], device=positions.device)
    return (sample_ids[:, None] * row_length + places).flatten()


class Dropout(nn.Module):
    """Zeroes a share p of the elements and scales the others by 1 / (1 - p) while training."""

    def __init__(self, p: float, seed: int, site: str) -> None:
        super().__init__()
        self.p = p
        self.key = site_key(seed, site)

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x [rows, width]; rows [rows] from token_rows, or None where nothing is dropped."""
        if not self.active:
            return x
        assert rows is not None
        columns = torch.arange(x.shape[1], device=x.device)
        kept = _kept(mix(mix(self.key, rows)[:, None], columns), self.p)
        return x.masked_fill(~kept, 0.0) * (1 / (1 - self.p))


class EmbeddingNoise(nn.Module):
    """Adds noise to embeddings while training: uniform within +-alpha / sqrt(seq x hidden) (Jain et al. 2023, NEFTune).

    Drawn as dropout is, so that no layout changes it.
    """

    def __init__(self, alpha: float, seed: int, row_length: int) -> None:
        """row_length: see token_rows."""
        super().__init__()
        self.alpha = alpha
        self.row_length = row_length
        self.key = site_key(seed, "embedding.noise")

    @property
    def active(self) -> bool:
        return self.training and self.alpha > 0

    def forward(self, x: Tensor, rows: Tensor, seq: int) -> Tensor:
        """x [rows, hidden]; rows [rows] from token_rows; seq: length of the samples."""
        columns = torch.arange(x.shape[1], device=x.device)
        drawn = _shift_right(mix(mix(self.key, rows)[:, None], columns), 64 - _BITS)
        # odd numbers between -2^24 and 2^24, which fp32 holds exactly
        odd = (2 * drawn + 1 - (1 << _BITS)).float()
        return x + (odd * (self.alpha / math.sqrt(seq * x.shape[1]) / (1 << _BITS))).to(x.dtype)


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention weights, keyed by sample, head, query and key."""

    p: float
    key: int
    sample_ids: Tensor
    """[batch]"""
    first_head: int
    """Number, in the whole model, of this rank's first query head."""

    def apply(self, weights: Tensor) -> Tensor:
        """weights [batch, heads, queries, keys]."""
        _, heads, queries, keys = weights.shape
        device = weights.device
        hashed = mix(self.key, self.sample_ids)[:, None, None, None]
        hashed = mix(hashed, self.first_head + torch.arange(heads, device=device)[:, None, None])
        hashed = mix(hashed, torch.arange(queries, device=device)[:, None])
        kept = _kept(mix(hashed, torch.arange(keys, device=device)), self.p)
        return weights.masked_fill(~kept, 0.0) * (1 / (1 - self.p))
