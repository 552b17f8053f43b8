"""The decoder-only model as a list of layers: embedding, blocks, norm, and a language model's head or a classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.models.config import ModelConfig
from megalm.nn.block import Block
from megalm.nn.config import Recompute
from megalm.nn.dropout import EmbeddingNoise, token_rows
from megalm.nn.init import initialize
from megalm.nn.layers import Layers
from megalm.nn.norm import hidden_norm
from megalm.nn.position import PositionTable


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a model, not built yet, so that a pipeline stage builds only its own."""

    name: str
    """`embedding`, `positions`, `blocks.0`, ..., `norm`, `head` or `classifier`: the prefix of parameters' names."""
    build: Callable[[], nn.Module]
    """Makes the layer; initialize() then fills its parameters."""
    tied_to: str | None = None
    """The layer whose table it shares, through its method tie()."""


class Embedding(nn.Module):
    """Token ids [batch, seq] -> hidden states. Layer: (tokens, segment_ids, positions, sample_ids) -> stream."""

    def __init__(self, config: ModelConfig, layers: Layers, *, noise: float = 0.0, seed: int = 0) -> None:
        """noise: NEFTune's alpha."""
        super().__init__()
        assert config.vocab_size is not None, "the tokenizer's size is filled in before a model is built"
        self.layers = layers
        self.table = layers.embedding(
            config.vocab_size, config.padded_vocab_size(), config.hidden_size, std=config.init_std
        )
        self.noise = EmbeddingNoise(noise, seed, config.max_position_embeddings)

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, segment_ids, positions, sample_ids = stream
        hidden = self.table(tokens.flatten())
        if self.noise.active:
            rows = self.layers.split(token_rows(positions, sample_ids, self.noise.row_length))
            hidden = self.noise(hidden, rows, positions.shape[1])
        return hidden, segment_ids, positions, sample_ids


def _weight(table: nn.Module) -> nn.Parameter:
    assert isinstance(table.weight, nn.Parameter)
    return table.weight


class FinalNorm(nn.Module):
    """The norm before the head. Layer: stream -> stream."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.norm = hidden_norm(config, layers)

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = stream
        return self.norm(hidden), *rest


class Head(nn.Module):
    """Logits of the next token. Layer: stream -> [tokens, padded_vocab / T]; padding columns can not be predicted."""

    weight: Tensor

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the tokenizer's size is filled in before a model is built"
        self.layers = layers
        rows = config.padded_vocab_size() // layers.tensor_size
        self.real_columns = min(max(config.vocab_size - layers.tensor_rank * rows, 0), rows)
        self.columns = rows
        if not config.tie_word_embeddings:
            table = layers.embedding(
                config.vocab_size, config.padded_vocab_size(), config.hidden_size, std=config.init_std
            )
            self.register_parameter("weight", _weight(table))

    def tie(self, embedding: Embedding) -> None:
        """Use the embedding's table, the same parameter, as weight."""
        self.register_parameter("weight", _weight(embedding.table))

    def forward(self, stream: tuple[Tensor, ...]) -> Tensor:
        logits = self.layers.project(self.layers.enter(stream[0]), self.weight)
        if self.real_columns < self.columns:
            # Unseen by autograd: a probability of exactly zero has a gradient of exactly zero.
            logits.detach()[:, self.real_columns :] = torch.finfo(logits.dtype).min
        return logits


class Classifier(nn.Module):
    """Logits of classes at every position. Layer: stream -> [tokens, num_labels], fp32, the same on every tensor rank.

    All positions have them, so that several examples may share a row: a task says where each of them is read. There are
    few classes, so every rank holds the weight whole.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        assert config.num_labels is not None, "the task's classes are counted before a model is built"
        self.layers = layers
        linear = layers.linear(config.hidden_size, config.num_labels, bias=config.head_bias, std=config.init_std)
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(linear, name))

    def forward(self, stream: tuple[Tensor, ...]) -> Tensor:
        # No enter(): the ranks do not share the work, and each finds the whole gradient of its tokens by itself.
        bias = None if self.bias is None else self.layers.replicated(self.bias)
        logits = F.linear(stream[0], self.layers.replicated(self.weight), bias)
        return self.layers.collect(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def decoder(
    config: ModelConfig,
    layers: Layers,
    *,
    seed: int,
    segmented: bool = True,
    recompute: Recompute = "none",
    noise: float = 0.0,
) -> list[LayerSpec]:
    """The layers of `config`, in order.

    seed: of dropout. segmented: False promises that every row is one segment. recompute: what is computed again in the
    backward pass. noise: on embeddings, NEFTune's alpha.
    """
    output_std = config.init_std
    if config.scale_output_init:
        output_std /= (2 * config.num_layers) ** 0.5

    def block(name: str) -> Callable[[], nn.Module]:
        return lambda: Block(
            config,
            layers,
            name=name,
            std=config.init_std,
            output_std=output_std,
            seed=seed,
            segmented=segmented,
            recompute=recompute,
        )

    specs = [LayerSpec("embedding", lambda: Embedding(config, layers, noise=noise, seed=seed))]
    if config.position in ("learned", "sinusoidal") or config.hidden_dropout:
        specs.append(LayerSpec("positions", lambda: PositionTable(config, layers, std=config.init_std, seed=seed)))
    specs += [LayerSpec(f"blocks.{i}", block(f"blocks.{i}")) for i in range(config.num_layers)]
    specs.append(LayerSpec("norm", lambda: FinalNorm(config, layers)))
    if config.head == "language_model":
        tied_to = "embedding" if config.is_tied else None
        specs.append(LayerSpec("head", lambda: Head(config, layers), tied_to=tied_to))
    else:
        specs.append(LayerSpec("classifier", lambda: Classifier(config, layers)))
    return specs


def full_name(specs: Sequence[LayerSpec], name: str) -> str:
    """A parameter's name in the model from its name by layer index: `3.attention.query.weight` (with positions in a
    layer of their own) -> `blocks.1.attention.query.weight`. A tied head's weight has the name of the embedding's.
    """
    index, _, suffix = name.partition(".")
    spec = specs[int(index)]
    return f"{spec.name}.{suffix}" if spec.tied_to is None else f"{spec.tied_to}.table.{suffix}"


class LayerList(nn.Module):
    """A whole model in one process: children are named by layer index, and forward is a loop over them."""

    def __init__(self, specs: Sequence[LayerSpec], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.specs = list(specs)
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def tie(self) -> None:
        """Let layers share the tables that their specs say, after building or after moving from the meta device."""
        for spec in self.specs:
            if spec.tied_to is not None:
                head, embedding = self.layer(spec.name), self.layer(spec.tied_to)
                assert isinstance(head, Head) and isinstance(embedding, Embedding)
                head.tie(embedding)

    def forward(self, stream: tuple[Tensor, ...]) -> Tensor:
        """(tokens [batch, seq], segment_ids, positions, sample_ids) -> logits of classes or the vocabulary's slice."""
        flowing: tuple[Tensor, ...] | Tensor = stream
        for layer in self.children():
            flowing = layer(flowing)
        assert isinstance(flowing, Tensor)
        return flowing

    def body(self, stream: tuple[Tensor, ...]) -> Tensor:
        """What the head sees: (tokens [batch, seq], segment_ids, positions, sample_ids) -> hidden states."""
        for layer in self.children():
            if not isinstance(layer, Head):
                stream = layer(stream)
        return stream[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head says of it, of the whole vocabulary: hidden states -> [tokens, padded_vocab]."""
        head = self.layer("head")
        assert isinstance(head, Head)
        return head.layers.gather(head((hidden,)))

    def layer(self, name: str) -> nn.Module:
        """The layer that its spec calls `name`."""
        return self.get_submodule(str([spec.name for spec in self.specs].index(name)))

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Every parameter by its full name; a tied one once, as the embedding's."""
        return {full_name(self.specs, name): parameter for name, parameter in self.named_parameters()}


def build_model(
    specs: Sequence[LayerSpec],
    seed: int | None,
    tensor_rank: int = 0,
    tensor_size: int = 1,
    finish: Callable[[nn.Module], object] = lambda layer: None,
) -> LayerList:
    """Build every layer, draw its weights (seed: see initialize) and tie what is tied.

    finish: called with each layer when it is drawn, before the next is built, to keep less of it.
    """
    built = []
    for spec in specs:
        built.append(spec.build())
        initialize(built[-1], spec.name, seed, tensor_rank, tensor_size)
        finish(built[-1])
    model = LayerList(specs, built)
    model.tie()
    return model
