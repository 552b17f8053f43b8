"""The position-wise feed-forward layer."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megalm.nn.config import BlockConfig
from megalm.nn.layers import Layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when gated (Shazeer 2020)."""

    def __init__(self, config: BlockConfig, layers: Layers, *, std: float, output_std: float) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.feed_forward_width, config.mlp_bias
        self.layers = layers
        self.activation = ACTIVATIONS[config.activation]
        self.gate = layers.column(hidden, inner, bias=bias, std=std) if config.gated else None
        self.up = layers.column(hidden, inner, bias=bias, std=std)
        self.down = layers.row(inner, hidden, bias=bias, std=output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states -> hidden states; inside, [tokens, intermediate / T]."""
        x = self.layers.enter(hidden)
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))
