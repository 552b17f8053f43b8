"""Text from a model, token by token, for one prompt or a batch of them."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.errors import MegalmError
from megalm.eval.inference import Reading
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
from megalm.tokenizer.base import Tokenizer

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes bytes to that are not a whole character, or not yet."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's distribution, in this order.

    repetition_penalty: logits of tokens that the row holds already are divided by it, or multiplied where negative
    (Keskar et al. 2019); greedy choice sees it too. temperature: logits are divided by it; 0 always takes the most
    likely token (greedy). top_k: only the k most likely tokens (Fan et al. 2018). top_p: of these, only the fewest
    whose probabilities reach p together (nucleus sampling, Holtzman et al. 2020). min_p: of these, only those at
    least this share as likely as the most likely one (Nguyen et al. 2024).

    Raises MegalmError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise MegalmError(f"temperature {self.temperature} is not a number from 0 (greedy) up: 0.8 is a usual one")
        if self.top_k is not None and self.top_k < 1:
            raise MegalmError(f"top-k {self.top_k} leaves no token: give 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise MegalmError(f"top-p {self.top_p} is not a probability above 0 and up to 1: 0.95 is a usual one")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise MegalmError(f"min-p {self.min_p} is not a share from 0 to 1: 0.05 is a usual one")
        if not 0 < self.repetition_penalty < float("inf"):
            raise MegalmError(
                f"repetition penalty {self.repetition_penalty} is not a number above 0: 1 has no effect, 1.1 is a "
                "usual one"
            )


def penalize(logits: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [batch, vocab] with those of the ids that each row holds made less likely by `penalty` above 1."""
    penalized = logits.clone()
    for row, ids in zip(penalized, rows, strict=True):
        held = torch.tensor(sorted({*ids}), device=row.device)
        held = held[held < len(row)]
        row[held] = torch.where(row[held] < 0, row[held] * penalty, row[held] / penalty)
    return penalized


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What each token is drawn with: logits [..., vocab] -> the same shape, fp32. The temperature is above 0."""
    logits = logits.float()
    # Differences from the largest logit: a small temperature then cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        ordered, tokens = scaled.sort(descending=True, stable=True)
        if sampling.top_k is not None:
            ordered[..., sampling.top_k :] = -torch.inf
        if sampling.top_p is not None:
            likely = ordered.softmax(-1)
            ordered[likely.cumsum(-1) - likely >= sampling.top_p] = -torch.inf
        scaled = torch.empty_like(scaled).scatter_(-1, tokens, ordered)
    drawn = scaled.softmax(-1)
    if sampling.min_p is not None:
        drawn[drawn < sampling.min_p * drawn.amax(-1, keepdim=True)] = 0
        drawn /= drawn.sum(-1, keepdim=True)
    return drawn


class Generation:
    """Rows of ids that grow by one id a step, each until it ends.

    Each row draws from a stream of its own, number n from that of seed `seed` + n, or of the n-th of several: it says
    what it says alone, whoever is beside it (a batch's matrix products may still round otherwise, and tip the balance
    between two equally likely tokens).
    """

    def __init__(
        self,
        model: LayerList,
        prompts: Sequence[Sequence[int]],
        *,
        context: int,
        vocab_size: int,
        ends: Collection[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | Sequence[int],
    ) -> None:
        """prompts: of one id or more. context: the model sees this many last ids, at positions from 0. vocab_size: ids
        from there on are never chosen. ends: ids that end a row and are left out of it."""
        assert all(prompts), "a prompt holds one id at least"
        self.active = list(range(len(prompts))) if max_new_tokens > 0 else []
        """Numbers of the rows that have not ended."""
        self._rows = [list(prompt) for prompt in prompts]
        self._most = [len(prompt) + max_new_tokens for prompt in prompts]
        self._vocab_size = vocab_size
        self._ends = frozenset(ends)
        self._sampling = sampling
        seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else seed
        self._random = [torch.Generator().manual_seed(each) for each in seeds]
        self._reading = Reading(model, context=context, length=max(self._most, default=0))
        self._unread: list[Sequence[int]] = list(prompts)

    def step(self) -> dict[int, int]:
        """The next id of each active row, but of those that end with it.

        Raises MegalmError if the model's logits are not finite.
        """
        logits = self._reading.read(self._unread)[:, : self._vocab_size]
        if not logits.isfinite().all():
            raise MegalmError("the model's logits are not finite, its training diverged: use an earlier checkpoint")
        chosen = dict(zip(self.active, self._choose(logits), strict=True))
        new = {row: token for row, token in chosen.items() if token not in self._ends}
        for row, token in new.items():
            self._rows[row].append(token)
        self._go_on([row for row in new if len(self._rows[row]) < self._most[row]])
        return new

    def stop(self, rows: Collection[int]) -> None:
        """End these rows, of which some may have ended already."""
        self._go_on([row for row in self.active if row not in rows])

    def _choose(self, logits: Tensor) -> list[int]:
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, [self._rows[row] for row in self.active], sampling.repetition_penalty)
        if sampling.temperature == 0:
            return logits.argmax(-1).tolist()
        drawn = probabilities(logits, sampling).cpu()
        return [
            int(torch.multinomial(likely, 1, generator=self._random[row]))
            for row, likely in zip(self.active, drawn, strict=True)
        ]

    def _go_on(self, rows: list[int]) -> None:
        """With these of the active rows."""
        if rows and rows != self.active:
            self._reading.keep([self.active.index(row) for row in rows])
        self.active = rows
        self._unread = [self._rows[row][-1:] for row in rows]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as the beginning of a document; what begins one, or else ends the one before, if it is empty."""
    return [*tokenizer.begins, *tokenizer.encode(text)] or [tokenizer.eos_id]


class Text:
    """The text of ids that come one by one after a prompt's, in pieces, as soon as each is certain.

    A character may take several ids: until the last of them comes it decodes to U+FFFD, and is held back. So is what
    may become a stop string; the text ends before the first that appears.
    """

    WINDOW = 32
    """Ids that are decoded again with each new one, about."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string came."""
        self._tokenizer = tokenizer
        self._stop = [each for each in stop if each]
        self._held = ""
        self._ids = list(prompt)
        self._whole = 0  # ids before a place where all characters were whole: without them, the rest decodes as before
        self._decoded = len(tokenizer.decode(self._ids))

    def add(self, token: int) -> str:
        """What is certain now and was not before; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._decoded :]
        self._decoded = max(self._decoded, len(certain))
        if certain == text and len(self._ids) - self._whole >= self.WINDOW:
            self._ids = self._ids[self._whole :]
            self._whole = len(self._ids)
            self._decoded = len(self._tokenizer.decode(self._ids))
        return self._release(new)

    def end(self) -> str:
        """The rest, once no more ids come."""
        if self.stopped:
            return ""
        shown = self._release(self._tokenizer.decode(self._ids)[self._decoded :])
        return shown if self.stopped else shown + self._held

    def _release(self, new: str) -> str:
        """`new` behind what is held, up to the first stop string, but for what may be a stop string's beginning."""
        text = self._held + new
        found = [place for each in self._stop if (place := text.find(each)) >= 0]
        self.stopped = bool(found)
        keep = max((_overlap(text, each) for each in self._stop), default=0)
        shown = min(found) if found else len(text) - keep
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))


def generate(
    model: LayerList,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    ends: Collection[int] = (),
    seed: int | Sequence[int] = 0,
) -> Iterator[tuple[int, str]]:
    """The continuations of prompts of one id or more, as they come: (number of the prompt, piece of whole characters).

    A row goes on until its document ends, an id of `ends` or a stop string comes (both are left out), or
    max_new_tokens. sampling: by default Sampling(), the model's own distribution. The model sees the last
    max_position_embeddings tokens. seed: as of Generation. Under tensor parallelism every rank calls it and gets the
    same.

    Raises MegalmError if the model's logits are not finite.
    """
    rows = Generation(
        model,
        prompts,
        context=config.max_position_embeddings,
        vocab_size=tokenizer.vocab_size,
        ends={tokenizer.eos_id, *ends},
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        seed=seed,
    )
    texts = [Text(tokenizer, prompt, stop) for prompt in prompts]
    while rows.active:
        before = rows.active
        for row, token in rows.step().items():
            if piece := texts[row].add(token):
                yield row, piece
        rows.stop([row for row in rows.active if texts[row].stopped])
        for row in before:
            if row not in rows.active and (rest := texts[row].end()):
                yield row, rest


def collect(pieces: Iterable[tuple[int, str]], prompts: int) -> list[str]:
    """The whole continuation of each prompt from what generate() yields."""
    texts = [""] * prompts
    for row, piece in pieces:
        texts[row] += piece
    return texts
