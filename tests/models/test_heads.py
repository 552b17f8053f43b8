"""Heads of classes: logits, loss and gradients equal Hugging Face's own classes with the same weights, in fp32.

Each comparison is repeated with something planted that is wrong by a little, which it must catch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
from megalm.nn.config import HeadKind
from megalm.nn.layers import Layers
from megalm.nn.loss import class_loss, head_loss, span_loss
from tests.models.test_decoder_parity import (
    BATCH,
    GPT2,
    HF_SIZES,
    SEQ,
    SIZES,
    TOLERANCE,
    VOCAB,
    build,
    gradient_differences,
    theirs_from_ours,
)

LABELS = 5
LAST = torch.tensor([SEQ - 1, SEQ - 9])
"""Of each row, the place of its last token that is no padding."""
CLASSES: dict[str, dict[str, Any]] = {
    "llama": {
        "sequence_classification": transformers.LlamaForSequenceClassification,
        "token_classification": transformers.LlamaForTokenClassification,
        "question_answering": transformers.LlamaForQuestionAnswering,
    },
    "gpt2": {
        "sequence_classification": transformers.GPT2ForSequenceClassification,
        "token_classification": transformers.GPT2ForTokenClassification,
        "question_answering": transformers.GPT2ForQuestionAnswering,
    },
}
PROBLEMS = {
    "sequence_classification": ["single_label_classification", "multi_label_classification"],
    "token_classification": [""],
    "question_answering": [""],
}
CASES = [(family, head, problem) for family in CLASSES for head in PROBLEMS for problem in PROBLEMS[head]]


def rows(head: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(ids with padding behind the ends, attention mask, stream); the pad id appears nowhere else.

    Question answering has none: Hugging Face's takes padding for places that an answer may be at.
    """
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (BATCH, SEQ), generator=draw)
    positions = torch.arange(SEQ).repeat(BATCH, 1)
    real = positions <= (SEQ if head == "question_answering" else LAST[:, None])
    return ids * real, real.long(), (ids * real, torch.zeros_like(positions), positions, torch.arange(BATCH))


def targets(head: str, problem: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(our labels, our weights, Hugging Face's labels), its mean being a sum of ours."""
    draw = torch.Generator().manual_seed(4)
    weights = torch.zeros(BATCH, SEQ)
    if head == "question_answering":
        begin, end = torch.tensor([3, 0]), torch.tensor([7, SEQ - 10])
        labels = torch.zeros(BATCH, SEQ, 3, dtype=torch.long)
        labels[:, 0] = torch.stack((begin, end, torch.full((BATCH,), SEQ)), dim=-1)
        weights[:, 0] = 1 / BATCH
        return labels, weights, {"start_positions": begin, "end_positions": end}
    if head == "token_classification":
        trained = (torch.rand(BATCH, SEQ, generator=draw) < 0.5) & (torch.arange(SEQ) <= LAST[:, None])
        labels = torch.randint(0, LABELS, (BATCH, SEQ), generator=draw)
        return labels, trained / trained.sum(), {"labels": labels.masked_fill(~trained, -100)}
    weights[torch.arange(BATCH), LAST] = 1 / BATCH
    if problem == "multi_label_classification":
        chosen = torch.randint(0, 2, (BATCH, LABELS), generator=draw)
        labels = torch.zeros(BATCH, SEQ, LABELS, dtype=torch.long)
        labels[torch.arange(BATCH), LAST] = chosen
        return labels, weights, {"labels": chosen.float()}
    classes = torch.tensor([4, 1])
    return classes[:, None].repeat(1, SEQ), weights, {"labels": classes}


def settings(family: str, head: HeadKind, problem: str) -> tuple[ModelConfig, Any]:
    """A model of ours, and Hugging Face's of the same sizes."""
    labels = 2 if head == "question_answering" else LABELS
    ours: dict[str, Any] = SIZES | {"head": head, "num_labels": labels}
    theirs = {"num_labels": labels, "pad_token_id": 0, "problem_type": problem or None}
    if family == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 64}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"), 0.0)
        config: Any = transformers.GPT2Config(**sizes, **off, **theirs, use_cache=False)
        return ModelConfig(**ours | GPT2), CLASSES[family][head](config)
    config = transformers.LlamaConfig(**HF_SIZES, **theirs, classifier_dropout=0.0)
    return ModelConfig(**ours), CLASSES[family][head](config)


def largest_difference(
    family: str, head: HeadKind, problem: str, plant: Callable[[LayerList], None] = lambda model: None
) -> float:
    """Of logits, loss and every gradient; gradients relative to the largest entry of their tensor."""
    config, theirs = settings(family, head, problem)
    ours = build(config, segmented=False)
    found = theirs.load_state_dict(theirs_from_ours(ours.named_weights(), config, family), strict=False)
    assert not found.unexpected_keys
    assert not found.missing_keys
    theirs.train()
    plant(ours)
    ids, mask, stream = rows(head)
    labels, weights, their_labels = targets(head, problem)

    logits = ours(stream)
    loss = head_loss(head, Layers(), logits, labels, weights, 0.0)
    loss.backward()
    their = theirs(input_ids=ids, attention_mask=mask, **their_labels)
    their.loss.backward()

    logits = logits.unflatten(0, ids.shape)
    if head == "sequence_classification":
        differences = [(logits[torch.arange(BATCH), LAST] - their.logits).abs().max()]
    elif head == "token_classification":
        differences = [((logits - their.logits) * mask[..., None]).abs().max()]
    else:
        differences = [(logits - torch.stack((their.start_logits, their.end_logits), -1)).abs().max()]
    differences.append((loss - their.loss).abs())
    gradients = theirs_from_ours({name: p.grad for name, p in ours.named_weights().items()}, config, family)
    differences += gradient_differences(gradients, theirs)
    return max(difference.item() for difference in differences)


@pytest.mark.parametrize(("family", "head", "problem"), CASES)
def test_heads_equal_hugging_face(family: str, head: HeadKind, problem: str) -> None:
    assert largest_difference(family, head, problem) < TOLERANCE

    def swap(model: LayerList) -> None:
        weight = model.named_weights()["classifier.weight"]
        weight.data = weight.data.flip(0)

    assert largest_difference(family, head, problem, swap) > 100 * TOLERANCE


def test_a_language_model_has_no_classes() -> None:
    with pytest.raises(ValueError, match="z_loss"):
        ModelConfig(head="question_answering", z_loss=0.1)


def test_examples_that_share_a_row_have_the_losses_of_rows_of_their_own() -> None:
    """Spans see the positions of their own example only, wherever it lies."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 10, 2, generator=draw)
    labels, weights = torch.zeros(2, 10, 3, dtype=torch.long), torch.zeros(2, 10)
    places = [
        (0, 0, 1, 2, 4, 0.5),
        (0, 4, 0, 0, 3, 2.0),
        (1, 2, 3, 5, 6, 1.0),
    ]  # row, first, begin, end, length, weight
    alone = []
    for row, first, begin, end, length, weight in places:
        labels[row, first], weights[row, first] = torch.tensor([begin, end, length]), weight
        here = logits[row, first : first + length].log_softmax(0)
        alone.append(-weight * (here[begin, 0] + here[end, 1]) / 2)
    packed = span_loss(logits.flatten(0, 1), labels, weights)
    torch.testing.assert_close(packed, torch.stack(alone).sum())
    labels[0, 0, 2] += 1  # a neighbour's position counts
    assert (span_loss(logits.flatten(0, 1), labels, weights) - packed).abs() > 1e-3


def test_a_batch_without_examples_has_a_loss_of_zero_and_a_gradient() -> None:
    for width, loss, labels in (
        (2, span_loss, torch.zeros(2, 3, 3, dtype=torch.long)),
        (4, class_loss, torch.zeros(2, 3, dtype=torch.long)),
        (4, class_loss, torch.zeros(2, 3, 4, dtype=torch.long)),
    ):
        logits = torch.randn(6, width, requires_grad=True)
        value = loss(logits, labels, torch.zeros(2, 3))
        value.backward()
        assert value.item() == 0
        assert logits.grad is not None and not logits.grad.any()
