"""The loss of a language model: a weighted sum over tokens."""

from torch import Tensor

from megalm.nn.layers import Layers


def token_loss(layers: Layers, logits: Tensor, labels: Tensor, loss_weights: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over tokens of weight x (cross entropy + z_loss x log-normaliser^2), fp32 (PaLM, section 5).

    logits [tokens, padded_vocab / T]; labels [batch, seq] int64, an id everywhere, also where the weight is 0;
    loss_weights [batch, seq] fp32: mask and normalisation together, for there is no averaging here. The result is the
    same on every tensor-parallel rank.
    """
    losses = layers.cross_entropy(logits, labels.flatten())
    if z_loss:
        losses = losses + z_loss * layers.logsumexp(logits).square()
    return (losses * loss_weights.flatten()).sum()
