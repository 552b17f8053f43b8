"""Text from a model, token by token.

Every token runs the model over all tokens so far: there is no cache of keys and values.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
from megalm.tokenizer.base import Tokenizer

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes bytes to that are not a whole character, or not yet."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's distribution, in this order.

    temperature: logits are divided by it; 0 always takes the most likely token (greedy). top_k: only the k most likely
    tokens (Fan et al. 2018). top_p: of these, only the fewest whose probabilities reach p together (nucleus sampling,
    Holtzman et al. 2020).

    Raises MegalmError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise MegalmError(f"temperature {self.temperature} is not a number from 0 (greedy) up: 0.8 is a usual one")
        if self.top_k is not None and self.top_k < 1:
            raise MegalmError(f"top-k {self.top_k} leaves no token: give 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise MegalmError(f"top-p {self.top_p} is not a probability above 0 and up to 1: 0.95 is a usual one")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What each token is drawn with: logits [vocab] -> [vocab], fp32. The temperature is above 0."""
    logits = logits.float()
    # Differences from the largest logit: a small temperature then cannot overflow.
    scaled = (logits - logits.max()) / sampling.temperature
    ordered, tokens = scaled.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[sampling.top_k :] = -torch.inf
    likely = ordered.softmax(0)
    if sampling.top_p is not None:
        before = likely.cumsum(0) - likely
        likely[before >= sampling.top_p] = 0
        likely /= likely.sum()
    return torch.zeros_like(likely).scatter(0, tokens, likely)


@torch.inference_mode()
def next_logits(model: LayerList, tokens: Sequence[int]) -> Tensor:
    """Logits of the token after `tokens`, the model's whole context: [padded_vocab], fp32, on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)  # [1, seq]
    positions = torch.arange(len(tokens), device=device)[None]
    stream = (ids, torch.zeros_like(ids), positions, torch.zeros_like(ids[:, 0]))
    *body, head = model.children()
    for layer in body:
        stream = layer(stream)
    return head((stream[0][-1:], *stream[1:]))[0].float().cpu()  # the head sees the last token only


def generate_ids(
    model: LayerList,
    prompt: Sequence[int],
    *,
    context: int,
    vocab_size: int,
    eos_id: int | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[int]:
    """New ids after a prompt of one or more, up to eos_id (left out) or max_new_tokens.

    context: the model sees this many last ids, at positions from 0. vocab_size: ids from there on are never chosen.
    seed: the same ids come again on the same device.

    Raises MegalmError if the model's logits are not finite.
    """
    random = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = next_logits(model, ids[-context:])[:vocab_size]
        if not logits.isfinite().all():
            raise MegalmError("the model's logits are not finite, its training diverged: use an earlier checkpoint")
        if sampling.temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial(probabilities(logits, sampling), 1, generator=random))
        if chosen == eos_id:
            return
        ids.append(chosen)
        yield chosen


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as the beginning of a document; what begins one, or else ends the one before, if it is empty."""
    begins = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    return [*begins, *tokenizer.encode(text)] or [tokenizer.eos_id]


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int]) -> Iterator[str]:
    """Text of the new ids after a prompt's, in pieces, as soon as each is certain.

    A character may take several ids: until the last of them comes it decodes to U+FFFD, and is held back.
    """
    ids = list(prompt)
    shown = len(tokenizer.decode(ids))
    for token in new:
        ids.append(token)
        certain = tokenizer.decode(ids).rstrip(REPLACEMENT)
        if len(certain) > shown:
            yield certain[shown:]
            shown = len(certain)
    if rest := tokenizer.decode(ids)[shown:]:
        yield rest


def generate(
    model: LayerList,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of a prompt, in pieces of whole characters, until the document ends or max_new_tokens.

    sampling: by default Sampling(), the model's own distribution. The model sees the last max_position_embeddings
    tokens. Raises MegalmError if the prompt is not Unicode text or the model's logits are not finite.
    """
    ids = encode_prompt(tokenizer, prompt)
    new = generate_ids(
        model,
        ids,
        context=config.max_position_embeddings,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        seed=seed,
    )
    return stream_text(tokenizer, ids, new)
