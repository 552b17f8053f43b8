"""Adapters compute what peft's do, start as nothing, merge exactly; and the gate lets gradients through or not."""

import pytest
import torch
from torch import Tensor, nn

from megalm.models import tuning as tunings
from megalm.models.config import ModelConfig, TuningConfig
from megalm.models.decoder import LayerList, build_model
from megalm.models.tuning import tuned_decoder
from megalm.nn.adapter import adapt, adapter_of, merged
from megalm.nn.gate import gates
from megalm.nn.layers import Layers
from megalm.optim.parameters import parameter_groups

ROWS, INPUTS, OUTPUTS, RANK, ALPHA = 7, 12, 10, 3, 5.0
MODEL = ModelConfig(
    hidden_size=16, num_attention_heads=4, num_layers=2, intermediate_size=24, vocab_size=50, max_position_embeddings=16
)


def projection(method: str, bias: bool) -> nn.Module:
    layer = Layers().column(INPUTS, OUTPUTS, bias=bias, std=0.3)
    adapt(layer, Layers(), rank=RANK, alpha=ALPHA, directional=method == "dora")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_forward_and_gradients_are_pefts(method: str, bias: bool) -> None:
    peft = pytest.importorskip("peft")
    ours = projection(method, bias)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=method == "dora")
    plain = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=bias))
    theirs = peft.get_peft_model(plain, config)
    names = {
        "weight": "0.base_layer.weight",
        "bias": "0.base_layer.bias",
        "lora_A": "0.lora_A.default.weight",
        "lora_B": "0.lora_B.default.weight",
        "lora_magnitude": "0.lora_magnitude_vector.default.weight",
    }
    there = {names[name]: p for name, p in ours.named_parameters()}
    matching = dict(theirs.base_model.model.named_parameters())
    assert matching.keys() == there.keys()
    with torch.no_grad():
        for name, p in there.items():
            matching[name].copy_(p)
            matching[name].requires_grad_(True)
    x = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(2))
    outs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    for out in outs:
        out.square().sum().backward()
    for name, p in there.items():
        torch.testing.assert_close(p.grad, matching[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_weights_compute_the_same(method: str) -> None:
    layer = projection(method, bias=True)
    parts = dict(layer.named_parameters())
    scale, magnitude = ALPHA / RANK, parts.get("lora_magnitude")
    weight = merged(parts["weight"], parts["lora_A"], parts["lora_B"], scale, magnitude)
    x = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(nn.functional.linear(x, weight, parts["bias"]), layer(x), rtol=1e-5, atol=1e-5)


def build(tuning: TuningConfig, **changes: object) -> LayerList:
    return build_model(tuned_decoder(MODEL.model_copy(update=changes), tuning, Layers(), seed=0), seed=3)


def logits(model: LayerList) -> Tensor:
    tokens = torch.arange(16).view(2, 8)
    positions = torch.arange(8).repeat(2, 1)
    return model((tokens, torch.zeros_like(tokens), positions, torch.arange(2)))


def test_a_model_with_new_adapters_is_the_model() -> None:
    plain, adapted = build(TuningConfig()), build(TuningConfig(method="lora"))
    assert {name for name in adapted.named_weights() if "lora" not in name} == set(plain.named_weights())
    assert torch.equal(logits(plain), logits(adapted))
    assert sum(adapter_of(module) is not None for module in adapted.modules()) == 2 * 7


def test_noise_has_its_size_and_depends_on_the_sample_alone() -> None:
    model = build(TuningConfig(neftune_alpha=5.0)).train()
    embedding = model.layer("embedding")
    tokens = torch.zeros(64, 8, dtype=torch.int64)
    stream = (tokens, tokens, torch.arange(8).repeat(64, 1), torch.arange(64))
    plain = embedding.eval()(stream)[0]
    noise = embedding.train()(stream)[0] - plain
    most = 5.0 / (8 * 16) ** 0.5
    assert noise.abs().max() <= most and abs(noise.mean()) < 0.02 * most
    assert noise.std().item() == pytest.approx(most / 3**0.5, rel=0.02)
    half = embedding(tuple(part[40:] for part in stream))[0]
    assert torch.equal(half - plain[40 * 8 :], noise[40 * 8 :])
    assert not torch.equal(noise[:8], noise[8:16])


def test_a_closed_gate_stops_all_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the language model's head as a task's."""
    monkeypatch.setattr(tunings, "HEAD", "head")
    model = build(TuningConfig(head_first_steps=2))
    names = model.named_weights()
    [gate] = gates(model)
    groups = parameter_groups(names.items(), 0.1, lambda name, p: True, in_head=lambda name, p: tunings.is_head(name))
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in names.items()}

    def step(head_only: bool) -> dict[str, Tensor]:
        gate.is_open = not head_only
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if group["head"] or not head_only else 0.0
        optimizer.zero_grad()
        logits(model).logsumexp(-1).sum().backward()
        optimizer.step()
        return {name: p.grad.clone() for name, p in names.items()}

    gradients = step(head_only=True)
    for name, p in names.items():
        if name.startswith("head."):
            assert gradients[name].any() and not torch.equal(p, before[name])
        else:
            assert not gradients[name].any() and torch.equal(p, before[name])
            assert not any(optimizer.state[p][moment].any() for moment in ("exp_avg", "exp_avg_sq"))
    gradients = step(head_only=False)
    assert all(gradient.any() for gradient in gradients.values())


def test_a_head_that_is_not_there_cannot_come_first() -> None:
    assert gates(build(TuningConfig(head_first_steps=2))) == []
