"""What a step's memory is predicted to be, what is measured, and what a run does about it. No GPU."""

import gc
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megalm.errors import MegalmError
from megalm.training.config import RunConfig
from megalm.training.memory import ROOM, Memory, choose_recompute, predict
from tests.distributed.ranks import run_ranks
from tests.distributed.training import config, join, micro_batches
from tests.training.runs import train_run

PLAIN = {"attention_backend": "plain"}
"""Keeps scores, so that selective recomputation is worth something."""


def run(recompute: str = "none", **sections: dict[str, Any]) -> RunConfig:
    """Large enough that a step's memory is mainly what is predicted."""
    model = {"hidden_size": 128, "vocab_size": 2048, "attention_backend": "sdpa"}
    train = {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 128, "precision": "bf16"}
    return config(
        model=model | sections.pop("model", {}),
        train=train | sections.pop("train", {}),
        parallel={"recompute": recompute} | sections.pop("parallel", {}),
        **sections,
    )


def step_memory(config: RunConfig) -> tuple[int, int]:
    """On a rank: bytes of all tensors between two steps, and the most that a step holds beside them: the least of three
    steps, since gloo's own thread may be late to free what it has summed."""
    from megalm.training.build import build_engine

    joined = join(config)
    engine, _ = build_engine(config, joined, torch.device("cpu"), lambda norm: True)
    for step in range(2):
        engine.step(micro_batches(step, config, joined.data_rank, joined.layout), 1e-3)
    live = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    between = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in live}.values())
    del live

    def most(step: int) -> int:
        with torch.profiler.profile(profile_memory=True) as profiler:
            engine.step(micro_batches(step, config, joined.data_rank, joined.layout), 1e-3)
        assert profiler.profiler is not None
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = [0, *itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns()))]
        return max(held)

    return between, min(most(step) for step in range(2, 5))


def states(memory: Memory) -> int:
    return memory.weights + memory.master_weights + memory.gradients + memory.moments


PREDICTED = {
    "none": (1, run()),
    "selective": (1, run("selective")),
    "full": (1, run("full")),
    "optimizer states are cut over ranks": (2, run()),
    "scores are kept": (1, run(model=PLAIN)),
    "masks are kept": (1, run(data={"attend_across_documents": False})),
    "two gradients of the logits": (1, run(model={"z_loss": 1e-4})),
    "gradients are copied to be summed": (2, run("full", train={"micro_batch_size": 1, "sequence_length": 32})),
    "copies of an update": (
        1,
        run("full", train={"micro_batch_size": 1, "sequence_length": 32}, optimizer={"implementation": "torch"}),
    ),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_what_is_predicted_is_what_a_step_takes(name: str) -> None:
    ranks, config = PREDICTED[name]
    predicted = predict(config, ranks, on_cpu=True)
    assert predicted.total == states(predicted) + predicted.activations + predicted.temporaries
    for between, most in run_ranks(ranks, step_memory, config):
        assert between == pytest.approx(states(predicted), rel=0.02)
        assert most == pytest.approx(predicted.activations + predicted.temporaries, rel=0.02)


@pytest.mark.parametrize(
    "model",
    [
        {"position": "learned", "norm": "layernorm", "activation": "gelu", "tie_word_embeddings": True},
        {"position": "alibi", "qk_norm": True},
        {"hidden_dropout": 0.1, "parallel_residual": True},
        {"attention_dropout": 0.1, "attention_backend": "plain"},
        {"sliding_window": 16},
        {"sliding_window": 16, "attention_backend": "flash2"},
    ],
)
def test_more_recomputation_keeps_less_of_any_model(model: dict[str, Any]) -> None:
    none, selective, full = (
        predict(run(how, model=model)).activations  # type: ignore[arg-type]
        for how in ("none", "selective", "full")
    )
    assert none > selective > full


def test_a_mask_is_a_tensor_for_sdpa_and_not_for_flash_attention() -> None:
    def activations(backend: str, apart: bool) -> int:
        data = {"attend_across_documents": not apart}
        return predict(run(model={"attention_backend": backend}, data=data)).activations

    assert activations("sdpa", apart=True) > activations("sdpa", apart=False)
    assert activations("flash2", apart=True) == activations("flash2", apart=False)


def test_rows_and_ranks_change_the_prediction_as_they_should() -> None:
    whole, half = predict(run()), predict(run(train={"micro_batch_size": 2}))
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.01)
    cut = predict(run(), data_parallel=4)
    assert (cut.weights, cut.gradients, cut.activations) == (whole.weights, whole.gradients, whole.activations)
    assert (cut.master_weights, cut.moments) == (whole.master_weights // 4, whole.moments // 4)


def test_a_classifier_has_no_logits_of_the_vocabulary() -> None:
    classifier = predict(run(model={"head": "sequence_classification", "num_labels": 3}))
    assert classifier.activations < predict(run()).activations - 0.9 * 2 * 4 * 128 * 2048


def test_a_gpu_widens_neither_logits_nor_gradients() -> None:
    """One kernel reads the logits and writes their gradient, one adds a bf16 gradient to its fp32 sum."""
    assert predict(run(), on_cpu=True).total > predict(run()).total
    largest = run(model={"vocab_size": 2**16})
    assert predict(largest, on_cpu=True).total - predict(largest).total == 4 * 2**16 * 128


def memory_for(predicted: int) -> int:
    """The smallest GPU that a prediction fits."""
    return math.ceil(predicted / ROOM)


def test_auto_takes_the_least_recomputation_that_fits() -> None:
    none, selective, full = (predict(run(how, model=PLAIN), 2).total for how in ("none", "selective", "full"))

    def chosen(memory: int | None) -> tuple[str, int | None]:
        return choose_recompute(run("auto", model=PLAIN), 2, memory)

    assert chosen(None) == ("none", None), "a CPU"
    assert chosen(memory_for(none)) == ("none", none)
    assert chosen(memory_for(none) - 1) == chosen(memory_for(selective)) == ("selective", selective)
    assert chosen(memory_for(selective) - 1) == chosen(memory_for(full)) == ("full", full)
    with pytest.raises(MegalmError, match="a step is predicted to take") as refused:
        chosen(memory_for(full) - 1)
    mib = memory_for(full) / 2**20
    assert str(refused.value) == (
        f"a step is predicted to take {full / 2**20:.0f} MiB even with parallel.recompute full, and of the {mib:.0f} "
        "MiB that a GPU here has 90% may be filled: lower train.micro_batch_size, start more ranks, or cut the model "
        "over ranks with parallel.tensor and parallel.recompute full"
    )
    with pytest.raises(MegalmError, match="may be filled: start more ranks"):
        choose_recompute(run("auto", train={"micro_batch_size": 1}), 1, 2**20)


def test_what_is_named_is_taken_whatever_is_predicted() -> None:
    assert choose_recompute(run("selective"), 1, 1) == ("selective", predict(run("selective")).total)
    fp32 = run("selective", train={"precision": "fp32"})
    assert choose_recompute(fp32, 1, 1) == ("selective", None), "of fp32 nothing is known"


UNKNOWN: dict[str, dict[str, dict[str, Any]]] = {
    "parallel.tensor 2": {"parallel": {"tensor": 2}},
    "parallel.pipeline 2": {"parallel": {"pipeline": 2}},
    "parallel.zero 2": {"parallel": {"zero": 2}},
    "parallel.offload_optimizer": {"parallel": {"offload_optimizer": True}},
    "train.precision fp32": {"train": {"precision": "fp32"}},
    "tuning.method lora": {"tuning": {"method": "lora"}},
    "tuning.freeze": {"tuning": {"freeze": ["embedding.*"]}},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_predicted_is_refused(what: str) -> None:
    sentence = (
        f"parallel.recompute auto goes by a step's predicted memory, and none is predicted with {what}: set "
        "parallel.recompute to none, selective or full"
    )
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        run("auto", **UNKNOWN[what])
    with pytest.raises(MegalmError, match=f"memory is not predicted with {what}"):
        predict(run("full", **UNKNOWN[what]))


def settled(config: RunConfig, memories: list[int]) -> tuple[str, str]:
    """On a rank with so much memory: what recomputation its plan has then, and what is said; or the refusal."""
    from megalm.training.build import _with_recompute
    from megalm.training.plan import Plan

    joined, unused = join(config), None
    planned = Plan(config, joined.layout, 1, tokenizer=unused, unproved="")  # type: ignore[arg-type]
    try:
        planned, said, _ = _with_recompute(planned, joined, torch.device("cpu"), memories[joined.rank])
    except MegalmError as error:
        return "refused", str(error)
    return planned.config.parallel.recompute, said


def test_all_ranks_go_by_the_smallest_gpu() -> None:
    config = run("auto", model=PLAIN)
    full = predict(run("full", model=PLAIN), 2).total
    small = memory_for(full)
    said = f"full, {full / 2**20:.0f} MiB predicted at the peak of a step, of {small / 2**20:.0f} MiB"
    assert run_ranks(2, settled, config, [2**40, small]) == [("full", said)] * 2
    (first, why), (second, same) = run_ranks(2, settled, config, [2**40, small - 1])
    assert first == second == "refused" and why == same and "even with parallel.recompute full" in why


def test_the_predicted_attention_is_the_one_that_is_taken() -> None:
    """Dropout of attention weights leaves `auto` only the plain backend, which keeps the scores."""
    config = run("auto", model={"attention_backend": "auto", "attention_dropout": 0.1})
    plain = predict(run(model=PLAIN | {"attention_dropout": 0.1})).total
    [(recompute, _)] = run_ranks(1, settled, config, [memory_for(plain) - 1])
    assert recompute == "selective"


def expecting(run: Any) -> None:
    """A prediction for the run, as on a GPU."""
    from megalm.training.callbacks.metrics import Metrics

    [place] = [n for n, callback in enumerate(run.callbacks) if isinstance(callback, Metrics)]
    run.callbacks[place] = Metrics(run.config.logging, torch.device("cpu"), predicted=3 * 2**30)


def test_a_run_on_a_cpu_says_what_auto_took_and_resumes(settings: Callable[..., dict[str, Any]]) -> None:
    tree = settings(
        parallel={"recompute": "auto"},
        train={"steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32, "precision": "bf16"},
        schedule={"total_steps": 3},
        checkpoint={"every": 2},
    )
    assert run_ranks(2, train_run, tree) == [0, 0]
    folder = Path(tree["run"]["directory"])
    said = (folder / "said.txt").read_text()
    assert re.search(r"^recompute +none$", said, re.MULTILINE) and "predicted" not in said
    assert "recompute: none" in (folder / "config.yaml").read_text()
    tree["train"]["steps"] = 3
    assert run_ranks(2, train_run, tree, expecting) == [0, 0]
    said = (folder / "said.txt").read_text()
    assert "parallel.recompute" not in said, "nothing has changed since the checkpoint"
    assert re.search(r"^memory: [\d.]+ .iB at the peak, 3.0 GiB were predicted of a step$", said, re.MULTILINE)
