"""The attention layer and the block: segments, tensor-parallel slices, cross-attention, recomputation, dropout."""

import copy

import pytest
import torch
from torch import Tensor, nn

from megalm.nn import attention
from megalm.nn.attention import Attention, requirements
from megalm.nn.block import Block
from megalm.nn.config import BlockConfig
from megalm.nn.init import Spec, declare, initialize
from megalm.nn.kernels import Requirements
from megalm.nn.layers import Layers

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
LENGTHS = (5, 4, 7)  # documents of the packed row


def layer(
    built: type, config: BlockConfig, layers: Layers | None = None, seed: int = 0, **options: object
) -> nn.Module:
    where = {"name": "blocks.0"} if built is Block else {"site": "blocks.0.attention"}
    module = built(config, layers or Layers(), std=0.3, output_std=0.3, seed=seed, **where, **options)
    initialize(module, "blocks.0", seed=1)
    return module


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row of documents: hidden [tokens, 32], segments, positions, sample ids."""
    hidden = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0))
    segments = torch.cat([torch.full((length,), i) for i, length in enumerate(LENGTHS)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return hidden, segments, positions, torch.tensor([5])


VARIANTS = {
    "rotary": {},
    "alibi": {"position": "alibi"},
    "window": {"sliding_window": 3},
    "grouped-normed": {"num_key_value_heads": 2, "qk_norm": True},
}


@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_give_what_separate_ones_give(variant: str, backend: str) -> None:
    block = layer(Block, BlockConfig(**SIZES | VARIANTS[variant], attention_backend=backend))
    hidden, segments, positions, samples = packed()
    together = block((hidden, segments, positions, samples))[0]
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        alone = block((hidden[part], torch.zeros(1, length).long(), torch.arange(length)[None], samples))[0]
        assert (together[part] - alone).abs().max() < 1e-5
        start += length
    # the same comparison sees a leak between documents
    leaking = block((hidden, torch.zeros_like(segments), positions, samples))[0]
    assert (together - leaking).abs().max() > 1e-3
    assert (together[: LENGTHS[0]] - leaking[: LENGTHS[0]]).abs().max() < 1e-5


def test_prefix_lengths_reach_the_mask() -> None:
    prefixed = layer(Attention, BlockConfig(**SIZES), kind="prefix", segmented=False)
    hidden, segments, positions, samples = packed()

    def changed_by(token: int, prefix: int) -> list[int]:
        """Tokens whose output depends on the input of `token`."""
        lengths = torch.tensor([prefix])
        moved = hidden.clone()
        moved[token] += 1.0
        before, after = (prefixed(x, segments, positions, samples, prefix_lengths=lengths) for x in (hidden, moved))
        return ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()

    everything = list(range(sum(LENGTHS)))
    assert changed_by(3, prefix=6) == everything
    assert changed_by(8, prefix=6) == everything[8:]
    assert changed_by(3, prefix=0) == everything[3:]


# ---- tensor parallelism without processes: every rank's module in turn, outputs summed as the row projection would


class Rank(Layers):
    """The factory of one rank of `size`; reductions are left to the test."""

    def __init__(self, rank: int, size: int) -> None:
        self.tensor_rank, self.tensor_size = rank, size

    def column(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        projection = nn.Linear(in_features, out_features // self.tensor_size, bias=bias)
        for parameter in projection.parameters():
            declare(parameter, Spec(std=std, shard_dim=0))
        return projection

    def row(self, in_features: int, out_features: int, *, bias: bool, std: float) -> nn.Module:
        assert not bias
        projection = nn.Linear(in_features // self.tensor_size, out_features, bias=False)
        declare(projection.weight, Spec(std=std, shard_dim=1))
        return projection


HEADS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "eight-over-two": {"num_attention_heads": 8, "num_key_value_heads": 2},
}
EXTRAS = {
    "rotary": {},
    "alibi": {"position": "alibi"},
    "normed": {"qk_norm": True},
    "dropout": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_sum_to_the_whole(size: int, heads: str, extra: str) -> None:
    config = BlockConfig(**SIZES | HEADS[heads] | EXTRAS[extra])
    hidden, *where = packed()

    def run(layers: Layers) -> tuple[Tensor, dict[str, Tensor]]:
        module = Attention(config, layers, std=0.3, output_std=0.3, seed=0, site="blocks.0.attention")
        initialize(module, "blocks.0.attention", 1, layers.tensor_rank, layers.tensor_size)
        out = module(hidden, *where)
        out.square().sum().backward() if layers.tensor_size == 1 else out.backward(2 * whole)
        return out.detach(), {name: p.grad for name, p in module.named_parameters()}

    whole, expected = run(Layers())
    parts = [run(Rank(rank, size)) for rank in range(size)]
    assert torch.allclose(sum(out for out, _ in parts), whole, atol=1e-5)
    for name, gradient in expected.items():
        shards = [gradients[name] for _, gradients in parts]
        if shards[0].shape == gradient.shape:  # held whole: partial sums
            joined = sum(shards)
        else:
            joined = torch.cat(shards, dim=1 if name.startswith("output") else 0)
        assert torch.allclose(joined, gradient, atol=1e-4 * gradient.abs().max().item()), name
    # the same comparison sees a rank that takes another's place
    wrong = sum(out for out, _ in (*parts[:-1], parts[0]))
    assert not torch.allclose(wrong, whole, atol=1e-3)


# ---- the cross-attention slot


def test_cross_attention_slot() -> None:
    """Against softmax(q k') v written out, with the context as keys and values."""
    config = BlockConfig(**SIZES, num_key_value_heads=2, norm="layernorm", activation="gelu")
    block = layer(Block, config, cross_attention=True)
    hidden, segments, positions, samples = packed()
    context = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    context_segments = torch.tensor([[0, 0, 1, 1, 1, 2]])
    out, *rest = block((hidden, segments, positions, samples, context, context_segments))
    assert rest[-2] is context and rest[-1] is context_segments

    x = hidden + block.attention(block.attention_norm(hidden), segments, positions, samples)
    cross = block.cross_attention
    source = block.cross_attention_norm(x)
    q = cross.query(source).view(-1, 4, 8).transpose(0, 1)
    k, v = (p(context).view(-1, 2, 8).transpose(0, 1).repeat_interleave(2, 0) for p in (cross.key, cross.value))
    scores = q @ k.transpose(1, 2) / 8**0.5
    scores = scores.masked_fill(segments[0][:, None] != context_segments[0], float("-inf"))
    x = x + cross.output((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    expected = x + block.feed_forward(block.feed_forward_norm(x))
    assert torch.allclose(out, expected, atol=1e-5)


def test_decoder_only_block_has_an_empty_slot() -> None:
    names = dict(layer(Block, BlockConfig(**SIZES)).named_parameters())
    assert not any("cross" in name for name in names)
    assert "attention.query.weight" in names and "feed_forward.gate.weight" in names


# ---- recomputation and dropout


@pytest.mark.parametrize("changes", [{}, {"hidden_dropout": 0.2, "attention_dropout": 0.2}])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_is_bitwise_neutral(recompute: str, changes: dict) -> None:
    config = BlockConfig(**SIZES, qk_norm=True, **changes)
    results = []
    for how in ("none", recompute):
        block = layer(Block, config, recompute=how)
        hidden, *where = packed()
        hidden.requires_grad_()
        out = block((hidden, *where))[0]
        torch.rand(3)  # a random state that moved meanwhile must not matter
        out.square().sum().backward()
        results.append([out, hidden.grad, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saved_bytes(recompute: str) -> int:
    block = layer(Block, BlockConfig(**SIZES, attention_backend="plain"), recompute=recompute)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(packed())
    return kept


def test_recomputation_keeps_less() -> None:
    assert saved_bytes("full") < saved_bytes("selective") < saved_bytes("none")


def test_dropout_differs_between_sublayers_and_stops_in_evaluation() -> None:
    config = BlockConfig(**SIZES, hidden_dropout=0.5)
    block = layer(Block, config)
    keys = {module.key for module in (block.attention_dropout, block.feed_forward_dropout)}
    assert len(keys) == 2
    stream = packed()
    assert torch.equal(block(stream)[0], block(stream)[0])
    assert not torch.equal(block(stream)[0], block((*stream[:3], torch.tensor([6])))[0])
    assert not torch.equal(block(stream)[0], layer(Block, config, seed=9)(stream)[0])
    still = copy.deepcopy(block).eval()
    assert torch.equal(still(stream)[0], still((*stream[:3], torch.tensor([6])))[0])


def test_requirements_are_those_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Requirements] = []
    monkeypatch.setattr(attention, "resolve", lambda name, needs: asked.append(needs) or "plain")
    for changes in ({}, {"sliding_window": 4}, {"position": "alibi"}, {"attention_dropout": 0.1}):
        config = BlockConfig(**SIZES, num_key_value_heads=2, **changes)
        for segmented in (False, True):
            layer(Attention, config, segmented=segmented)(*packed())
            expected = requirements(config, device="cpu", dtype=torch.float32, segmented=segmented, sequence_length=16)
            assert asked.pop() == expected


def test_a_block_refuses_prefixes_that_its_stream_cannot_carry() -> None:
    for kind in ("causal", "full"):
        layer(Block, BlockConfig(**SIZES), kind=kind)
    with pytest.raises(AssertionError, match="no prefix lengths"):
        layer(Block, BlockConfig(**SIZES), kind="prefix")
