"""A pipeline stage of a trained model, which reads like the whole model."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, LayerSpec


class Pipe(Protocol):
    """The stages of one copy of a model (parallel.inference.Pipe)."""

    @property
    def stage(self) -> int: ...

    @property
    def stages(self) -> int: ...

    def receive(self, hidden: Tensor) -> None:
        """Fill `hidden` with what the stage before this one sends."""

    def send(self, hidden: Tensor) -> None:
        """Send to the stage behind this one."""

    def share(self, logits: Tensor) -> None:
        """Fill `logits` with the last stage's. Every stage calls it."""


def stages_of(specs: Sequence[LayerSpec], stages: int) -> list[int]:
    """The stage of each layer: blocks in even shares, what comes before them in the first, what comes behind in the
    last. There are as many blocks as stages, or more."""
    blocks = [index for index, spec in enumerate(specs) if spec.name.startswith("blocks.")]
    first, count = blocks[0], len(blocks)
    return [min(max(index - first, 0), count - 1) * stages // count for index in range(len(specs))]


class Stage(LayerList):
    """A model of which this rank holds one stage's layers only, under their indices in the whole.

    It is read as the whole is, through body() and logits(), by all stages at once and with the same rows; each gets
    the logits. Stages take their turns: while one computes, the others wait. This spreads a model over the memory of
    several ranks and makes none of them faster; what a batch is, is left to those who read it.

    A tied head that is on another stage than the embedding has a copy of its table.
    """

    def __init__(self, whole: LayerList, config: ModelConfig, pipe: Pipe) -> None:
        """whole: on the meta device, so that what other stages hold costs nothing here."""
        super().__init__(whole.specs, ())
        self.config = config
        self.pipe = pipe
        places = stages_of(whole.specs, pipe.stages)
        for (index, layer), place in zip(whole.named_children(), places, strict=True):
            if place == pipe.stage:
                self.add_module(index, layer)

    @property
    def _last(self) -> bool:
        return self.pipe.stage == self.pipe.stages - 1

    def tie(self) -> None:
        """Nothing is shared: embedding and head are on two stages."""

    def body(self, stream: tuple[Tensor, ...]) -> Tensor:
        """What this stage passes on: (tokens, segment_ids, positions, sample_ids) -> hidden states.

        The first stage looks at the tokens, the others only at their number.
        """
        if self.pipe.stage > 0:
            tokens, *rest = stream
            hidden = next(self.parameters()).new_empty(tokens.numel(), self.config.hidden_size)
            self.pipe.receive(hidden)
            stream = (hidden, *rest)
        hidden = super().body(stream)
        if not self._last:
            self.pipe.send(hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The last stage's, of its own hidden states: as many as are given here -> [tokens, padded_vocab]."""
        if self._last:
            logits = super().logits(hidden)
        else:
            logits = hidden.new_empty(len(hidden), self.config.padded_vocab_size())
        self.pipe.share(logits)
        return logits
