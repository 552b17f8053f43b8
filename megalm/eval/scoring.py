"""Log-likelihoods of continuations, batched by length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalm.eval.inference import head_logits, hidden_states
from megalm.models.decoder import LayerList

CHUNK = 512
"""Positions whose logits over the vocabulary are held at a time."""


@dataclass(frozen=True)
class Score:
    """loglikelihood: nats, of all ids of a continuation. greedy: whether each was the most likely one."""

    loglikelihood: float
    greedy: bool


@torch.inference_mode()
def score(model: LayerList, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Score rows of (context, continuation), of one id or more each, in one pass. Under tensor parallelism every rank
    calls it with the same rows and gets the same."""
    assert all(context and continuation for context, continuation in rows), "an id is scored behind another"
    inputs = [[*context, *continuation][:-1] for context, continuation in rows]
    hidden = hidden_states(model, inputs)
    places = [
        (row, place)
        for row, (given, (_, continuation)) in enumerate(zip(inputs, rows))
        for place in range(len(given) - len(continuation), len(given))
    ]
    row_numbers, positions = torch.tensor(places, device=hidden.device).T
    seen = hidden[row_numbers, positions]
    labels = torch.tensor([i for _, continuation in rows for i in continuation], device=hidden.device)
    values, best = [], []
    for part, wanted in zip(seen.split(CHUNK), labels.split(CHUNK)):
        logits = head_logits(model, part)
        values.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
        best.append(logits.argmax(-1) == wanted)
    lengths = [len(continuation) for _, continuation in rows]
    summed = [x.sum().item() for x in torch.cat(values).split(lengths)]
    return [
        Score(total, bool(greedy.all())) for total, greedy in zip(summed, torch.cat(best).split(lengths), strict=True)
    ]
