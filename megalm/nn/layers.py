"""The factory through which the model builds whatever tensor parallelism would change.

Shapes: tokens = batch x seq, flattened batch-major; T is the tensor-parallel degree. Hidden states are
[tokens, hidden], or [tokens / T, hidden] between sub-layers under sequence parallelism.

`Layers` is plain torch for one process (T = 1). megalm.parallel.tensor has the same methods over
megatron-core's layers; the model cannot tell them apart.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from megalm.nn.cross_entropy import cross_entropy, logsumexp
from megalm.nn.init import Spec, declare


def _empty(kind: type[nn.Module], *sizes: int, **options: Any) -> Any:
    """A module whose parameters initialize() or a checkpoint fills: torch's own draws take half a minute for 8B."""
    return skip_init(kind, *sizes, **options, device=torch.get_default_device())


class Layers:
    """Plain torch modules."""

    tensor_size = 1
    tensor_rank = 0

    def column(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        """Projection cut along its outputs: [tokens, in_features] -> [tokens, out_features / T]."""
        return self.linear(in_features, out_features, bias=bias, std=std)

    def row(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        """Projection cut along its inputs, summed over ranks: [tokens, in_features / T] -> hidden states."""
        return self.linear(in_features, out_features, bias=bias, std=std)

    def linear(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        """Projection that every rank holds whole."""
        layer = _empty(nn.Linear, in_features, out_features, bias=bias)
        declare(layer.weight, Spec(std=std))
        if bias:
            declare(layer.bias, Spec(value=0.0))
        return layer

    def embedding(self, num_embeddings: int, rows: int, width: int, *, std: float) -> nn.Module:
        """Table of `rows` (padded) rows, of which num_embeddings are drawn: ids [tokens] -> hidden states."""
        layer = _empty(nn.Embedding, rows, width)
        declare(layer.weight, Spec(std=std, drawn_rows=num_embeddings))
        return layer

    def enter(self, hidden: Tensor) -> Tensor:
        """Hidden states as column projections want them: [tokens, hidden]. Several projections share one call."""
        return hidden

    def split(self, x: Tensor) -> Tensor:
        """This rank's part of a [tokens, ...] tensor that all ranks hold, aligned with hidden states."""
        return x

    def collect(self, x: Tensor) -> Tensor:
        """All tokens, on every rank, of what each computed whole on its part of them: [tokens / T, width] -> [tokens,
        width]. What follows must be the same on all ranks."""
        return x

    def replicated(self, parameter: Tensor) -> Tensor:
        """A parameter that is used on this rank's part of the tokens only, so its gradient is a partial sum."""
        return parameter

    def partial(self, parameter: Tensor) -> Tensor:
        """A whole parameter of which this rank uses a part of the outputs, so its gradient is a partial sum."""
        return parameter

    def reduce(self, x: Tensor) -> Tensor:
        """Hidden states from this rank's share of a sum over ranks: [tokens, width] -> as hidden states are cut."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum of all ranks' x, which autograd does not see."""
        return x.detach()

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits from an embedding table: [tokens, hidden] x [rows / T, hidden] -> [tokens, rows / T]."""
        return F.linear(hidden, weight)

    def gather(self, logits: Tensor) -> Tensor:
        """The whole vocabulary on every rank: [tokens, rows / T] -> [tokens, rows]."""
        return logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log p(label) of every token: [tokens, rows / T], [tokens] -> [tokens], in fp32."""
        return cross_entropy(logits, labels)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Log-normaliser over the whole vocabulary: [tokens, rows / T] -> [tokens], in fp32."""
        return logsumexp(logits)
