"""The list of layers: names, ties, padding, recomputation."""

import pytest
import torch
from torch import Tensor

from megalm.models.config import ModelConfig
from megalm.models.decoder import Head, LayerList, build_model, decoder, full_name
from megalm.nn.layers import Layers
from megalm.nn.loss import token_loss

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_layers": 2, "max_position_embeddings": 32}
BATCH, SEQ = 2, 12


def stream() -> tuple[Tensor, ...]:
    tokens = torch.randint(0, 50, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQ).repeat(BATCH, 1)
    return tokens, torch.zeros_like(positions), positions, torch.arange(BATCH)


def model(seed: int = 1, recompute: str = "none", **changes: object) -> LayerList:
    specs = decoder(ModelConfig(**SIZES | changes), Layers(), seed=0, recompute=recompute)
    return build_model(specs, seed)


def loss(network: LayerList) -> Tensor:
    labels = stream()[0].roll(-1, 1)
    return token_loss(Layers(), network(stream()), labels, torch.full(labels.shape, 1 / labels.numel()), z_loss=1e-3)


def test_names_of_layers_and_parameters() -> None:
    network = model()
    assert [spec.name for spec in network.specs] == ["embedding", "blocks.0", "blocks.1", "norm", "head"]
    block = {
        *(f"attention.{part}.weight" for part in ("query", "key", "value", "output")),
        *(f"feed_forward.{part}.weight" for part in ("gate", "up", "down")),
        "attention_norm.weight",
        "feed_forward_norm.weight",
    }
    assert network.named_weights().keys() == {
        "embedding.table.weight",
        *(f"blocks.{i}.{name}" for i in range(2) for name in block),
        "norm.norm.weight",
        "head.weight",
    }
    assert full_name(network.specs, "2.attention.query.weight") == "blocks.1.attention.query.weight"
    assert network.layer("blocks.1") is network.get_submodule("2")


def test_positions_have_a_layer_where_they_need_one() -> None:
    for changes in ({"position": "learned"}, {"position": "sinusoidal"}, {"hidden_dropout": 0.1}):
        assert [spec.name for spec in model(**changes).specs][:3] == ["embedding", "positions", "blocks.0"]
    assert "positions.weight" in model(position="learned").named_weights()


def test_layers_are_built_only_when_asked_for() -> None:
    """The layer that a pipeline stage builds alone has the weights of the whole model."""
    network = model()
    block = build_model([network.specs[2]], seed=1)
    for name, parameter in block.get_submodule("0").named_parameters():
        assert torch.equal(parameter, network.named_weights()[f"blocks.1.{name}"])


def test_tied_head_shares_the_parameter() -> None:
    tied, untied = model(tie_word_embeddings=True), model()
    assert tied.layer("head").weight is tied.layer("embedding").table.weight
    assert "head.weight" not in tied.named_weights()
    assert tied.specs[-1].tied_to == "embedding"
    # tying moves no other weight, and the table is the embedding's, not the head's
    for name, parameter in tied.named_weights().items():
        assert torch.equal(parameter, untied.named_weights()[name])
    head = Head(ModelConfig(**SIZES, tie_word_embeddings=True), Layers())
    assert not list(head.parameters())
    loss(tied).backward()
    loss(untied).backward()
    weight = tied.layer("embedding").table.weight
    assert weight.grad[:50].abs().min(dim=1).values.max() > 0  # every token, from the head's side


def test_output_projections_start_smaller() -> None:
    scaled, plain = model(num_layers=8), model(num_layers=8, scale_output_init=False)
    for name, parameter in scaled.named_weights().items():
        other = plain.named_weights()[name]
        ratio = 4.0 if name.endswith(("attention.output.weight", "feed_forward.down.weight")) else 1.0
        assert torch.allclose(parameter * ratio, other, rtol=1e-6), name


@pytest.mark.parametrize("tied", [False, True])
def test_padding_does_not_change_the_model(tied: bool) -> None:
    results = []
    for multiple in (1, 64, 128):
        network = model(pad_vocab_to_multiple_of=multiple, tie_word_embeddings=tied)
        value = loss(network)
        value.backward()
        results.append((value, {name: p.grad for name, p in network.named_weights().items()}))
    for value, gradients in results[1:]:
        assert torch.allclose(value, results[0][0], rtol=1e-6)
        for name, gradient in gradients.items():
            expected = results[0][1][name]
            assert torch.allclose(gradient[: len(expected)], expected, atol=1e-7), name
            assert not gradient[len(expected) :].any(), name


def test_unmasked_padding_would_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(self: Head, stream: tuple[Tensor, ...]) -> Tensor:
        return self.layers.project(stream[0], self.weight)

    right = loss(model(pad_vocab_to_multiple_of=1))
    monkeypatch.setattr(Head, "forward", unmasked)
    assert abs(loss(model(pad_vocab_to_multiple_of=64)) - right) > 1e-2


@pytest.mark.parametrize("rank, real", [(0, 32), (1, 18), (2, 0), (3, 0)])
def test_each_rank_masks_its_own_columns(rank: int, real: int) -> None:
    """50 ids padded to 128 over 4 ranks of 32 columns."""

    class Rank(Layers):
        tensor_rank, tensor_size = rank, 4

    head = Head(ModelConfig(**SIZES, pad_vocab_to_multiple_of=128, tie_word_embeddings=True), Rank())
    head.register_parameter("weight", torch.nn.Parameter(torch.ones(32, 32)))
    logits = head((torch.ones(3, 32),))
    assert logits.shape == (3, 32)
    assert (logits[:, :real] == 32).all() and (logits[:, real:] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_bitwise_neutral(recompute: str, dropout: float) -> None:
    values = []
    for how in ("none", recompute):
        network = model(recompute=how, hidden_dropout=dropout, attention_dropout=dropout)
        value = loss(network)
        value.backward()
        values.append([value, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_bf16_model_stays_near_fp32() -> None:
    """Nothing that must stay fp32 is kept where a cast would round it."""
    wide, narrow = model(), model().to(torch.bfloat16)
    assert not list(narrow.buffers())
    assert abs(loss(wide) - loss(narrow)) < 0.01
