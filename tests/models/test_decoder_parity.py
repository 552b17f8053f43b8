"""Forward and gradients equal Hugging Face's models with the same weights, in fp32.

Each comparison is repeated with something planted that is wrong by a little, which it must catch.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers

from megalm.convert.architectures import ARCHITECTURES, entries
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, build_model, decoder
from megalm.nn import position
from megalm.nn.config import RopeScaling
from megalm.nn.layers import Layers
from megalm.nn.loss import token_loss

VOCAB, BATCH, SEQ = 97, 2, 40
TOLERANCE = 1e-5
SIZES = {
    "vocab_size": VOCAB,
    "pad_vocab_to_multiple_of": 64,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_layers": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "init_std": 0.12,  # large enough that every part matters to the logits
    "scale_output_init": False,
}
BIASES = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), True)
GPT2 = BIASES | {
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "position": "learned",
    "tie_word_embeddings": True,
}
NEOX = BIASES | {"norm": "layernorm", "activation": "gelu", "rotary_fraction": 0.5, "parallel_residual": True}
HF_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "use_cache": False,
}


def theirs_from_ours(tensors: dict[str, torch.Tensor], config: ModelConfig, family: str) -> dict[str, torch.Tensor]:
    """Our tensors (weights or gradients) under Hugging Face's names and layouts."""
    architecture = next(known for known in ARCHITECTURES if known.model_type == family).of_head(config.head)
    named = {
        entry.theirs: entry.mapping.export([tensors[name] for name in entry.ours], config)
        for entry in entries(architecture, config)
    }
    # which GPT-NeoX's files call embed_out
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in named.items()}


def batch() -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=draw)
    positions = torch.arange(SEQ).repeat(BATCH, 1)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return inputs, labels, (inputs, torch.zeros_like(positions), positions, torch.arange(BATCH))


def build(config: ModelConfig, segmented: bool) -> LayerList:
    model = build_model(decoder(config, Layers(), seed=0, segmented=segmented), seed=3)
    with torch.no_grad():  # norms and biases start at constants, which would hide a mix-up
        draw = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def largest_difference(config: ModelConfig, theirs: transformers.PreTrainedModel, segmented: bool = False) -> float:
    """Of logits, loss and every gradient; gradients relative to the largest entry of their tensor."""
    family = theirs.config.model_type
    inputs, labels, stream = batch()
    ours = build(config, segmented)
    missing = theirs.load_state_dict(theirs_from_ours(ours.named_weights(), config, family), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied
    theirs.train()

    logits = ours(stream)
    loss = token_loss(Layers(), logits, labels, torch.full(labels.shape, 1 / labels.numel()))
    loss.backward()
    their_logits = theirs(input_ids=inputs).logits.flatten(0, 1)
    their_loss = F.cross_entropy(their_logits, labels.flatten())
    their_loss.backward()

    differences = [(logits[:, :VOCAB] - their_logits).abs().max(), (loss - their_loss).abs()]
    gradients = theirs_from_ours({name: p.grad for name, p in ours.named_weights().items()}, config, family)
    differences += gradient_differences(gradients, theirs)
    return max(difference.item() for difference in differences)


def gradient_differences(gradients: dict[str, torch.Tensor], theirs: torch.nn.Module) -> list[torch.Tensor]:
    """How far each gradient, under Hugging Face's names, is from that of their model, relative where it is above 1."""
    parameters = dict(theirs.named_parameters())
    assert gradients.keys() == parameters.keys()
    found = []
    for name, gradient in gradients.items():
        reference = parameters[name].grad
        assert reference is not None and reference.abs().max() > 0
        found.append((gradient - reference).abs().max() / reference.abs().max().clamp(min=1.0))
    return found


def llama(**changes: object) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF_SIZES | changes))


def qwen2(**changes: object) -> transformers.PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**HF_SIZES | changes))


def qwen3(**changes: object) -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**HF_SIZES | {"head_dim": 16} | changes))


def mistral(**changes: object) -> transformers.PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**HF_SIZES | {"head_dim": 12} | changes))


def gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=48,
            n_head=4,
            n_layer=2,
            n_inner=80,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def gpt_neox(share: float, **changes: object) -> transformers.PreTrainedModel:
    sizes = HF_SIZES | {"layer_norm_eps": 1e-5} | rope("default", partial_rotary_factor=share)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes | changes))


def rope(kind: str, **values: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | values}


LINEAR = RopeScaling(kind="linear", factor=4.0)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=1024)
HF_LLAMA3 = rope("llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)
HF_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=1024)

CASES = {
    # name: (our config, their model, a wrong config)
    "llama": ({}, llama, {"norm_eps": 1e-3}),
    "llama-gqa": ({"num_key_value_heads": 2}, lambda: llama(num_key_value_heads=2), {"rope_theta": 9000.0}),
    "llama-mqa-biases": (
        {"num_key_value_heads": 1, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
        {"position": "none"},
    ),
    "llama-linear": (
        {"rope_scaling": LINEAR},
        lambda: llama(**rope("linear", factor=4.0)),
        {"rope_scaling": RopeScaling(kind="linear", factor=4.1)},
    ),
    "llama-llama3": (
        {"rope_scaling": LLAMA3},
        lambda: llama(**HF_LLAMA3),
        {"rope_scaling": LLAMA3.model_copy(update={"high_freq_factor": 3.0})},
    ),
    "llama-yarn": (
        {"rope_scaling": YARN},
        lambda: llama(**HF_YARN),
        {"rope_scaling": YARN.model_copy(update={"beta_fast": 4.0})},
    ),
    "qwen2": (
        {"num_key_value_heads": 2, "attention_bias": True, "rope_theta": 1e6},
        lambda: qwen2(num_key_value_heads=2, **rope("default", rope_theta=1e6)),
        {"rope_theta": 9e5},
    ),
    "qwen3": (
        {"head_dim": 16, "num_key_value_heads": 2, "qk_norm": True},
        lambda: qwen3(num_key_value_heads=2, tie_word_embeddings=False),
        {"norm_eps": 1e-3},
    ),
    "qwen3-tied": (
        {"head_dim": 16, "num_key_value_heads": 2, "qk_norm": True, "tie_word_embeddings": True},
        lambda: qwen3(num_key_value_heads=2, tie_word_embeddings=True),
        {"activation": "geglu"},
    ),
    "mistral-window": (
        {"num_key_value_heads": 2, "sliding_window": 8},
        lambda: mistral(num_key_value_heads=2, sliding_window=8),
        {"sliding_window": 9},
    ),
    "gpt2": (GPT2, gpt2, {"activation": "gelu"}),
    "gpt-neox": (NEOX, lambda: gpt_neox(0.5), {"rotary_fraction": 1.0}),
    "gpt-neox-parallel": (NEOX, lambda: gpt_neox(0.5), {"parallel_residual": False}),
    "gpt-neox-sequential": (
        NEOX | {"parallel_residual": False, "rotary_fraction": 1.0},
        lambda: gpt_neox(1.0, use_parallel_residual=False),
        {"activation": "gelu_tanh"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_hugging_face(case: str) -> None:
    changes, theirs, _ = CASES[case]
    assert largest_difference(ModelConfig(**SIZES | changes), theirs()) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_comparison_catches_a_planted_mistake(case: str) -> None:
    changes, theirs, mistake = CASES[case]
    assert largest_difference(ModelConfig(**SIZES | changes | mistake), theirs()) > 3 * TOLERANCE


@pytest.mark.parametrize("case", ["llama-gqa", "mistral-window"])
def test_looking_at_equal_segments_changes_nothing(case: str) -> None:
    changes, theirs, _ = CASES[case]
    assert largest_difference(ModelConfig(**SIZES | changes), theirs(), segmented=True) < TOLERANCE


def test_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation's gradient turned the wrong way leaves the forward pass intact."""
    monkeypatch.setattr(
        position._Rotate, "backward", staticmethod(lambda ctx, g: (position._rotate(g, *ctx.saved_tensors), None, None))
    )
    assert largest_difference(ModelConfig(**SIZES), llama()) > 3 * TOLERANCE


def test_yarn_without_its_attention_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position, "rotary_attention_factor", lambda scaling: 1.0)
    assert largest_difference(ModelConfig(**SIZES, rope_scaling=YARN), llama(**HF_YARN)) > 3 * TOLERANCE
