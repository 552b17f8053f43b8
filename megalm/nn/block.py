"""The pre-norm Transformer block."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.nn.attention import Attention
from megalm.nn.config import BlockConfig, Recompute
from megalm.nn.dropout import Dropout, token_rows
from megalm.nn.feedforward import FeedForward
from megalm.nn.layers import Layers
from megalm.nn.norm import hidden_norm


class Block(nn.Module):
    """x + attention(norm(x)), then, where the slot is filled, + cross-attention(norm(x)), then + feed-forward(norm(x)).

    With parallel_residual, feed-forward's x is the block's input.

    Layer: the stream (hidden, segment_ids, positions, sample_ids) -> the stream. With cross-attention the stream ends
    in (context, context_segments), which pass through.
    """

    def __init__(
        self,
        config: BlockConfig,
        layers: Layers,
        *,
        name: str,
        std: float,
        output_std: float,
        seed: int,
        kind: Literal["causal", "full"] = "causal",
        segmented: bool = True,
        cross_attention: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        assert kind in ("causal", "full"), "the stream carries no prefix lengths"
        self.layers = layers
        self.row_length = config.max_position_embeddings
        self.parallel_residual = config.parallel_residual
        self.recompute = recompute

        def attend(site: str, cross: bool) -> Attention:
            return Attention(
                config,
                layers,
                std=std,
                output_std=output_std,
                seed=seed,
                site=f"{name}.{site}",
                kind=kind,
                segmented=segmented,
                cross=cross,
                recompute=recompute == "selective",
            )

        def drop(site: str) -> Dropout:
            return Dropout(config.hidden_dropout, seed, f"{name}.{site}")

        self.attention_norm = hidden_norm(config, layers)
        self.attention = attend("attention", cross=False)
        self.attention_dropout = drop("attention")
        self.cross_attention_norm = hidden_norm(config, layers) if cross_attention else None
        self.cross_attention = attend("cross_attention", cross=True) if cross_attention else None
        self.cross_attention_dropout = drop("cross_attention")
        self.feed_forward_norm = hidden_norm(config, layers)
        self.feed_forward = FeedForward(config, layers, std=std, output_std=output_std)
        self.feed_forward_dropout = drop("feed_forward")
        self._compiled: Callable[..., Tensor] | None = None

    def compile_training(self, device: torch.device, backend: str | None) -> None:
        """Let torch.compile fuse what stands around the matrix products in training; what evaluates or generates stays
        as it is. Blocks that are alike share what is compiled, at the first step.

        backend: the attention kernel that stands inside (kernels.traces); None leaves it outside.
        """
        assert self.cross_attention is None, "no decoder has one"
        self.attention.prepare_to_compile(device, backend)
        self._compiled = torch.compile(self._hidden, dynamic=False)

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        training = torch.is_grad_enabled()
        inside = self._compiled if self._compiled and training else self._hidden
        if self.recompute == "full" and training:
            hidden = checkpoint(inside, *stream, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = inside(*stream)
        return hidden, *stream[1:]

    def _hidden(
        self, x: Tensor, segment_ids: Tensor, positions: Tensor, sample_ids: Tensor, *context: Tensor
    ) -> Tensor:
        rows = None
        if self.attention_dropout.active:
            rows = self.layers.split(token_rows(positions, sample_ids, self.row_length))
        where = (segment_ids, positions, sample_ids)
        entered = x
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), *where), rows)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            encoded, encoded_segments = context
            mixed = self.cross_attention(
                self.cross_attention_norm(x), *where, context=encoded, context_segments=encoded_segments
            )
            x = x + self.cross_attention_dropout(mixed, rows)
        source = entered if self.parallel_residual else x
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(source)), rows)
