"""Keys and values that were computed before, so that a token which comes later need not compute them again."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention layer, by row and position: two [batch, capacity, kv_heads, head_dim].

    Rows need not be equally long. A row shorter than a call's tokens is padded behind them: what padding leaves at a
    position is overwritten by the token that comes to stand there, before any query may see it. Under tensor
    parallelism each rank keeps its own heads.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: positions to make room for."""
        self.capacity = capacity
        self.reach = 0
        """Positions that the next call's queries may see, from 0 on: its longest row's end. Set before each call."""
        self._kept: tuple[Tensor, Tensor] | None = None

    @property
    def begun(self) -> bool:
        """Whether there is anything from earlier calls."""
        return self._kept is not None

    def extend(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [batch, seq, kv_heads, head_dim] of tokens at `positions` [batch, seq].

        Returns all that are kept within reach, [batch, reach, kv_heads, head_dim] each; of a first call, which holds
        every row from its start, what came in.
        """
        if self._kept is None:
            batch, seq, heads, width = k.shape
            keys, values = (x.new_zeros(batch, self.capacity, heads, width) for x in (k, v))
            keys[:, :seq], values[:, :seq] = k, v
            self._kept = keys, values
            return k, v
        keys, values = self._kept
        rows = torch.arange(len(k), device=k.device)[:, None]
        keys[rows, positions], values[rows, positions] = k, v
        return keys[:, : self.reach], values[:, : self.reach]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, numbers in any order."""
        if self._kept is not None:
            keys, values = self._kept
            self._kept = keys[rows], values[rows]
