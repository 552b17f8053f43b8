"""A model read for its logits: rows of ids in one pass, or token by token with what came before remembered.

Rows need not be equally long: they are padded behind their ends, which no causal token sees. All ranks that share a
model call with the same rows, and each gets the whole vocabulary's logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megalm.models.decoder import LayerList
from megalm.nn.attention import Attention
from megalm.nn.cache import KeyValueCache

Rows = Sequence[Sequence[int]]


def hidden_states(model: LayerList, rows: Rows, starts: Sequence[int] | None = None) -> Tensor:
    """What the head sees, of rows of ids that stand at positions from 0 or from `starts`: [batch, seq, hidden].

    seq is the longest row's length; behind a shorter row's end is padding. A pipeline stage without the head has values
    of its own there, in whose place head_logits() takes the last stage's.
    """
    device = next(model.parameters()).device
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *([0] * (length - len(row)))] for row in rows], device=device)
    positions = torch.arange(length, device=device).repeat(len(rows), 1)
    if starts is not None:
        positions = positions + torch.tensor(starts, device=device)[:, None]
    stream = (ids, torch.zeros_like(ids), positions, torch.zeros_like(ids[:, 0]))
    return model.body(stream).view(*ids.shape, -1)


def head_logits(model: LayerList, hidden: Tensor) -> Tensor:
    """Logits of the whole padded vocabulary: [tokens, hidden] -> [tokens, padded_vocab], fp32."""
    return model.logits(hidden).float()


@torch.inference_mode()
def next_logits(model: LayerList, rows: Rows) -> Tensor:
    """Logits of the token after each row, which is all the model sees: [batch, padded_vocab], fp32."""
    return head_logits(model, _ends(hidden_states(model, rows), rows))


def _ends(hidden: Tensor, rows: Rows) -> Tensor:
    """Hidden states of the last token of each row: [batch, seq, hidden] -> [batch, hidden]."""
    lasts = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
    return hidden[torch.arange(len(rows), device=hidden.device), lasts]


class Reading:
    """Rows of ids that grow, and the logits of what comes next; keys and values of what was read are kept.

    Where a row outgrows the context, the model sees its last ids at positions from 0, so every key changes with every
    token, and each takes a pass over all of the context.
    """

    def __init__(self, model: LayerList, *, context: int, length: int) -> None:
        """context: ids that the model sees at most. length: that rows will reach; it bounds the memory."""
        self._model = model
        self._context = context
        self._rows: list[list[int]] = []
        self._length = min(length, context)
        self._caches: dict[Attention, KeyValueCache] = {}

    @torch.inference_mode()
    def read(self, rows: Rows) -> Tensor:
        """Read on by `rows` of ids: at first the rows' beginnings, of one id or more each; later one id each.

        Returns the logits of the token after each row: [batch, padded_vocab], fp32.
        """
        starts = [len(row) for row in self._rows]
        assert not starts or all(len(row) == 1 for row in rows)
        self._rows = [[*before, *new] for before, new in zip(self._rows or [[] for _ in rows], rows, strict=True)]
        if max(map(len, self._rows)) > self._context:
            self._caches = {}
            return next_logits(self._model, [row[-self._context :] for row in self._rows])
        if not self._caches:  # nothing was read yet, or a row that outgrew the context has ended
            attention = [module for module in self._model.modules() if isinstance(module, Attention)]
            self._caches = {module: KeyValueCache(self._length) for module in attention}
            rows, starts = self._rows, []
        with self._remembering():
            hidden = hidden_states(self._model, rows, starts or None)
        return head_logits(self._model, _ends(hidden, rows))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._rows = [self._rows[row] for row in rows]
        chosen = torch.tensor(rows, dtype=torch.long, device=next(self._model.parameters()).device)
        for cache in self._caches.values():
            cache.keep(chosen)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Attention sees its cache inside, and nobody's outside."""
        for attention, cache in self._caches.items():
            cache.reach = max(map(len, self._rows))
            attention.cache = cache
        try:
            yield
        finally:
            for attention in self._caches:
                attention.cache = None
