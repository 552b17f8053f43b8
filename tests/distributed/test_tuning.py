"""LoRA and DoRA train as peft trains transformers' model, under every kind of layout; heads that move first."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megalm.models import tuning as tunings
from megalm.models.decoder import build_model
from megalm.nn.layers import Layers
from megalm.training.config import RunConfig
from tests.distributed.ranks import Pool, RankFailed, run_ranks
from tests.distributed.training import STEPS, VOCAB, config, engine_curve, global_batch, join, micro_batches

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor": 2, "zero": 0},
    "tensor 2, sequence parallel": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline": 2},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
}
LOSS, NORM = 1e-5, 1e-4
"""Relative, over 20 steps in fp32 whose sums come in another order."""
ALPHA = 16.0
NAMES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "attention_norm": "input_layernorm",
    "embedding.table": "model.embed_tokens",
    "norm.norm": "model.norm",
    "head.": "lm_head.",
    "blocks.": "model.layers.",
}


def run(method: str, **parallel: Any) -> RunConfig:
    return config(
        model={"num_layers": 2, "init_std": 0.1},
        tuning={"method": method, "alpha": ALPHA},
        train={"micro_batch_size": 4},
        data={"sources": [{"path": "unused"}], "tokenizer": "unused", "attend_across_documents": True},
        optimizer={"learning_rate": 3e-3},
        parallel=parallel,
    )


def hugging_face_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs) if ours != "norm.norm" else name.replace("norm.norm", theirs, 1)
    return name


@cache
def pefts_curve(method: str, alpha: float = ALPHA) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of peft's model, from our first weights and A; B is zero in both."""
    ours = run(method)
    specs = tunings.tuned_decoder(ours.model, ours.tuning, Layers(), seed=ours.run.seed)
    weights = {name: p.detach() for name, p in build_model(specs, ours.run.seed).named_weights().items()}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=ours.model.feed_forward_width,
            max_position_embeddings=ours.model.max_position_embeddings,
            rms_norm_eps=ours.model.norm_eps,
            rope_theta=ours.model.rope_theta,
        )
    )
    base = {hugging_face_name(name): w for name, w in weights.items() if "lora_" not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:VOCAB]
    model.load_state_dict(base)
    linears = [name.rpartition(".")[2] for name in list(NAMES.values())[:7]]
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=ours.tuning.rank,
            lora_alpha=alpha,
            target_modules=linears,
            use_dora=method == "dora",
            task_type="CAUSAL_LM",
        ),
    ).train()
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(".lora_A"):
                place = hugging_face_name(name.removesuffix(".lora_A"))
                parameters[f"base_model.model.{place}.lora_A.default.weight"].copy_(weight)
    settings = ours.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    curve = []
    for step in range(STEPS):
        tokens, mask, _ = (torch.from_numpy(part) for part in global_batch(step, ours))
        logits = adapted(input_ids=tokens[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.gradient_clipping)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def distance(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> tuple[float, float]:
    off = np.abs(np.array(ours) / np.array(theirs) - 1).max(axis=0)
    return float(off[0]), float(off[1])


@pytest.fixture(scope="module")
def pool() -> Any:
    with Pool(2) as ranks:
        yield ranks


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_peft_does(method: str, layout: str, pool: Pool) -> None:
    curves = pool.run(engine_curve, run(method, **LAYOUTS[layout]))
    assert curves[0] == curves[1]
    loss, norm = distance(curves[0], pefts_curve(method))
    assert loss < LOSS and norm < NORM, f"loss off by {loss:.1e}, gradient norm by {norm:.1e}"
    assert curves[0][-1][0] < curves[0][0][0] - 0.1, "it learns"


def test_another_scale_or_method_is_seen() -> None:
    """Negative control."""
    assert distance(pefts_curve("lora", 1.01 * ALPHA), pefts_curve("lora"))[0] > 3 * LOSS
    assert distance(pefts_curve("dora"), pefts_curve("lora"))[0] > 3 * LOSS


def frozen(patterns: list[str], **parallel: Any) -> RunConfig:
    ours = run("full", **parallel)
    model = ours.model.model_copy(update={"num_layers": 4})
    return ours.model_copy(update={"model": model, "tuning": ours.tuning.model_copy(update={"freeze": patterns})})


def test_a_part_of_a_pipeline_that_trains_nothing(pool: Pool) -> None:
    """The first of DualPipeV's four parts is frozen whole; a rank that would train nothing is refused."""
    patterns = ["embedding.*", "blocks.0.*"]
    whole = pool.run(engine_curve, frozen(patterns, zero=1), 5)
    cut = pool.run(engine_curve, frozen(patterns, pipeline=2, pipeline_schedule="dualpipev"), 5)
    loss, norm = distance(cut[0], whole[0])
    assert loss < LOSS and norm < NORM
    with pytest.raises(RankFailed, match="tuning leaves pipeline stage 0 nothing to train: freeze less"):
        run_ranks(2, engine_curve, frozen(["embedding.*", "blocks.[01].*"], pipeline=2))
    with pytest.raises(RankFailed, match="tuning.freeze: blocks.9.* matches nothing in this model"):
        run_ranks(2, engine_curve, frozen(["blocks.9.*"]))


def head_first(ours: RunConfig, steps: int) -> tuple[list[float], list[dict[str, Any]]]:
    """With the language model's head as a task's: gradient norms, and what this rank holds before and after steps."""
    from megalm.training.build import build_engine

    tunings.HEAD = "head"
    joined = join(ours)
    engine, specs = build_engine(ours, joined, torch.device("cpu"), lambda norm: True)
    names = [spec.name for spec in specs]

    def held() -> dict[str, Any]:
        return {
            f"{piece.name}/{kind}": tensor.float().numpy().copy()
            for piece in engine.pieces(names, owned=False)
            for kind, tensor in piece.tensors.items()
        }

    norms, states = [], [held()]
    for step in range(steps):
        batches = micro_batches(step, ours, joined.data_rank, joined.layout)
        head_only = step < ours.tuning.head_first_steps
        norms.append(engine.step(batches, ours.optimizer.learning_rate, head_only).grad_norm)
        states.append(held())
    return norms, states


@pytest.mark.parametrize("layout", ["tensor 2", "pipeline 2", "ZeRO 2", "ZeRO 3"])
def test_the_body_waits_for_the_head(layout: str) -> None:
    ours = run("full", **LAYOUTS[layout])
    ours = ours.model_copy(update={"tuning": ours.tuning.model_copy(update={"head_first_steps": 2, "body_rate": 0.5})})
    results = run_ranks(2, head_first, ours, 3)
    for _, (start, first, second, third) in results:
        for key, value in third.items():
            name, _, kind = key.partition("/")
            if name.startswith("head."):
                assert not np.array_equal(second[key], value)
            elif kind == "weight":
                assert np.array_equal(start[key], first[key]) and np.array_equal(start[key], second[key])
                assert not np.array_equal(second[key], value), key
            else:
                assert not second[key].any() and value.any()
