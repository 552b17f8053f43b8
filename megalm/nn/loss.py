"""What a model is trained for: sums over positions of weight x loss.

Weights [batch, seq] are mask and normalisation together, fp32, for there is no averaging here; where one is 0, a label
may be anything that is one. A loss is the same on every tensor-parallel rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.nn.config import HeadKind
from megalm.nn.layers import Layers


def token_loss(layers: Layers, logits: Tensor, labels: Tensor, loss_weights: Tensor, z_loss: float = 0.0) -> Tensor:
    """The next token: cross entropy + z_loss x log-normaliser^2, fp32 (PaLM, section 5).

    logits [tokens, padded_vocab / T]; labels [batch, seq] int64, an id everywhere.
    """
    losses = layers.cross_entropy(logits, labels.flatten())
    if z_loss:
        losses = losses + z_loss * layers.logsumexp(logits).square()
    return (losses * loss_weights.flatten()).sum()


def class_loss(logits: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    """One class of several: cross entropy. Any number of them: binary cross entropy, mean over the classes.

    logits [tokens, classes]; labels [batch, seq] int64, or [batch, seq, classes] of 0 and 1.
    """
    if labels.dim() == 2:
        losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    else:
        truth = labels.flatten(0, 1).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=-1)
    return (losses * loss_weights.flatten()).sum()


def span_loss(logits: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
    """Where in an example a span begins and ends: cross entropy over the example's positions, mean of both.

    logits [tokens, 2] of beginning and end; labels [batch, seq, 3] int64. An example has its weight at its first
    position, whose labels are the places of the span's first and last position in the example, and its length.
    """
    batch, seq = loss_weights.shape
    rows, first = loss_weights.nonzero(as_tuple=True)
    begin, end, length = labels[rows, first].unbind(-1)
    place = torch.arange(seq, device=logits.device) - first[:, None]  # [examples, seq], within the example
    outside = (place < 0) | (place >= length[:, None])
    scores = logits.view(batch, seq, 2)[rows].masked_fill(outside[..., None], -torch.inf)
    places = first[:, None] + torch.stack((begin, end), dim=-1)
    losses = F.cross_entropy(scores, places, reduction="none").mean(dim=-1)
    return (losses * loss_weights[rows, first]).sum()


def head_loss(
    head: HeadKind, layers: Layers, logits: Tensor, labels: Tensor, loss_weights: Tensor, z_loss: float = 0.0
) -> Tensor:
    """The loss that belongs to a head."""
    if head == "language_model":
        return token_loss(layers, logits, labels, loss_weights, z_loss)
    return (span_loss if head == "question_answering" else class_loss)(logits, labels, loss_weights)
