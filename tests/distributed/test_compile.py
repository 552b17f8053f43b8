"""train.compile changes how fast a step is and nothing else."""

import shutil
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megalm.training.config import RunConfig
from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, engine_curve, join, micro_batches

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
STEPS = 6


def run(compile: bool = True, **sections: dict[str, Any]) -> RunConfig:
    sections["train"] = {"compile": compile, "micro_batch_size": 4} | sections.get("train", {})
    return config(**sections)


def counted(run: RunConfig) -> tuple[list[tuple[float, float]], int, int]:
    """The curve; graphs compiled in all, and how many of them after the first step."""
    from torch._dynamo.utils import counters

    from megalm.training.build import build_engine

    joined = join(run)
    engine, _ = build_engine(run, joined, torch.device("cpu"), lambda norm: True)
    curve, compiled = [], []
    for step in range(STEPS):
        batches = micro_batches(step, run, joined.data_rank, joined.layout)
        if step == STEPS // 2:
            engine.evaluate(batches)
        done = engine.step(batches, run.optimizer.learning_rate)
        curve.append((done.loss, done.grad_norm))
        compiled.append(counters["stats"]["unique_graphs"])
    return curve, compiled[-1], compiled[-1] - compiled[0]


@needs_compiler
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"qk_norm": True}, "parallel": {"recompute": "full"}},
        {
            "model": {"norm": "layernorm", "position": "learned", "activation": "gelu", "attention_bias": True},
            "parallel": {"recompute": "selective"},
        },
        {
            "model": {
                "sliding_window": 5,
                "rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
                "rotary_fraction": 0.5,
                "parallel_residual": True,
            },
            "data": {"sources": [{"path": "unused"}], "tokenizer": "unused", "attend_across_documents": True},
            "tuning": {"freeze": ["blocks.0.*"]},
        },
        {"model": {"position": "alibi"}, "parallel": {"offload_optimizer": True, "zero": 1}},
        {"tuning": {"method": "dora", "rank": 4}, "model": {"num_layers": 10}},
    ],
    ids=["llama", "qk-norm, full recomputation", "gpt2, selective recomputation", "window, yarn, one segment, frozen",
         "alibi, offload", "dora in more blocks than torch compiles one by one"],
)  # fmt: skip
def test_a_compiled_run_has_the_curve_of_a_plain_one(sections):
    assert_same_curve(1, sections)


def assert_same_curve(ranks: int, sections: dict[str, Any]) -> None:
    plain = run_ranks(ranks, engine_curve, run(compile=False, **sections), STEPS)
    for (curve, compiled, later), expected in zip(run_ranks(ranks, counted, run(**sections)), plain, strict=True):
        # Where the embedding is frozen, the first block's input has no gradient.
        assert compiled in ((1, 2) if "tuning" in sections else (1,)), "blocks share what is compiled"
        assert later == 0, "a run compiles once"
        assert curve == [pytest.approx(step, rel=1e-5) for step in expected]


GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "attention_bias": True}


@needs_compiler
@pytest.mark.parametrize(
    ("ranks", "sections"),
    [
        (2, {"parallel": {"pipeline": 2}}),
        (2, {"parallel": {"pipeline": 2, "pipeline_schedule": "dualpipev"}}),
        (2, {"parallel": {"tensor": 2}, "model": GPT2}),
        (2, {"parallel": {"tensor": 2, "sequence_parallel": True}, "tuning": {"method": "lora", "rank": 4}}),
        (
            2,
            {
                "parallel": {"tensor": 2, "recompute": "full"},
                "model": {"num_key_value_heads": 1, "qk_norm": True, "position": "alibi"},
            },
        ),
        (4, {"parallel": {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "recompute": "selective"}}),
    ],
    ids=["pipeline", "dualpipev", "tensor", "sequence, lora", "more tensor ranks than key heads", "tensor x pipeline"],
)
def test_collectives_are_part_of_what_is_compiled(ranks, sections):
    """One graph for all of a block, also where its parts talk to other ranks."""
    assert_same_curve(ranks, sections)


@needs_compiler
@pytest.mark.parametrize("zero", [1, 2])
def test_ranks_share_the_work_and_bf16_stays_close(zero):
    """On two ranks. What is fused is not rounded to bf16 in between, so that curves part by as much as that rounds."""
    sections: dict[str, Any] = {"parallel": {"zero": zero}, "train": {"precision": "bf16"}}
    [(ours, compiled, later), (again, _, _)] = run_ranks(2, counted, run(**sections))
    [plain, _] = run_ranks(2, engine_curve, run(compile=False, **sections), STEPS)
    assert ours == again and compiled > 0 and later == 0
    for (loss, norm), (plain_loss, plain_norm) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(plain_loss, rel=2e-3) and norm == pytest.approx(plain_norm, rel=2e-2)


def forget_residual() -> None:
    """A bug within what is compiled."""
    from megalm.nn.block import Block

    plain = Block._hidden
    Block._hidden = lambda self, x, *rest: plain(self, x, *rest) - 1e-3 * x  # type: ignore[method-assign]


@needs_compiler
def test_a_planted_bug_is_seen():
    [wrong] = run_ranks(1, engine_curve, run(), 2, forget_residual)
    [plain] = run_ranks(1, engine_curve, run(compile=False), 2)
    assert wrong != [pytest.approx(step, rel=1e-5) for step in plain]


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"parallel": {"zero": 3}}, "parallel.zero 3"),
        ({"model": {"hidden_dropout": 0.1}}, "dropout"),
        ({"model": {"norm_implementation": "apex"}}, "norm_implementation apex"),
        ({"train": {"precision": "fp16"}}, "precision fp16"),
        ({"train": {"deterministic": True}}, "deterministic"),
        ({"task": {"kind": "chat", "arrangement": "sorted"}}, "several lengths"),
    ],
)
def test_what_is_not_proved_is_refused(sections, why):
    with pytest.raises(ValidationError, match=f"train.compile is not proved with .*{why}"):
        run(**sections)


@needs_compiler
def test_a_missing_compiler_is_told_and_auto_does_without(monkeypatch, caplog):
    """One rank of two has none: both do without."""
    from types import SimpleNamespace

    from megalm.errors import MegalmError
    from megalm.layout import Layout
    from megalm.parallel import device
    from megalm.training import build
    from megalm.training.plan import Plan

    def refuse(function: object) -> object:
        raise RuntimeError("no g++\nmore of it")

    def on_rank_0(compile: bool | str, of_rank_1: str | None) -> bool | str:
        planned = Plan(run(train={"compile": compile}), Layout(), 1, tokenizer=None, unproved="")
        joined = SimpleNamespace(rank=0, gather=lambda mine: [mine, of_rank_1])
        return build._without_broken_compiler(planned, joined, None).config.train.compile

    assert device.compiler_problem(torch.device("cpu")) is None
    monkeypatch.setattr(torch, "compile", refuse)
    problem = device.compiler_problem(torch.device("cpu"))
    assert on_rank_0(True, None) is True and on_rank_0("auto", None) == "auto"
    with pytest.raises(
        MegalmError, match=r"does not work on rank 1 \(no g\+\+: install g\+\+\), or leave train.compile out"
    ):
        on_rank_0(True, problem)
    assert on_rank_0("auto", problem) is False
    assert "auto leaves it out" in caplog.text


def test_auto_compiles_on_a_gpu_what_is_proved():
    assert run(train={"compile": "auto"}).compiles("cuda")
    assert not run(train={"compile": "auto"}).compiles("cpu")
    assert run(train={"compile": "auto"}, parallel={"tensor": 2, "pipeline": 2}).compiles("cuda")
    assert not run(train={"compile": "auto"}, parallel={"zero": 3}).compiles("cuda")
    assert not run(train={"compile": "auto"}, model={"hidden_dropout": 0.1}).compiles("cuda")
    assert run().compiles("cpu") and not run(compile=False).compiles("cuda")


def test_blocks_that_evaluate_are_not_compiled():
    from megalm.models.decoder import build_model, decoder
    from megalm.nn.block import Block
    from megalm.nn.layers import Layers

    model = build_model(decoder(run().model, Layers(), seed=0), 0)
    called = []
    for block in (layer for layer in model.modules() if isinstance(layer, Block)):
        block.compile_training(torch.device("cpu"), "sdpa")
        block._compiled = lambda *stream: called.append(1) or stream[0]
    rows = torch.zeros(2, 16, dtype=torch.long)
    stream = (rows, rows, torch.arange(16).repeat(2, 1), torch.arange(2))
    with torch.no_grad():
        model(stream)
    assert not called
    model(stream)
    assert len(called) == 4
