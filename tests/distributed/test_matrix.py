"""One seed, one curve: layouts train the model that one process of plain torch trains (DESIGN, promise 1).

This is the part of the matrix that has every pair of choices in it; make test-matrix runs the others too.
"""

from functools import cache, partial
from typing import Any

import pytest

from megalm.parallel import proved
from tests.distributed import comparison, sabotage
from tests.distributed.matrix import GLOBAL_BATCH, Case, Runner, corpus, covering, expected, judge, matrix
from tests.distributed.ranks import run_ranks

TOGETHER = [
    Case(2, 2, 2, sequence_parallel=True, micro_batch=6, features="gpt"),
    Case(2, 2, 2, sequence_parallel=True, schedule="dualpipev", micro_batch=3, features="qwen"),
    Case(2, 3, 1, micro_batch=4, features="gpt"),
]
"""All axes at once; and three copies of tied ends, of which two could not differ."""
CASES = sorted({*covering(matrix()), *TOGETHER}, key=lambda case: (case.size, case.name))


LAYOUTS = "test_every_layout_trains_the_same_model"


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest) -> Runner:
    """Runs the chosen cases beside each other, ahead of the tests that ask for them."""
    ours = [item for item in request.session.items if getattr(item, "originalname", "") == LAYOUTS]
    return Runner([item.callspec.params["case"] for item in ours])  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_trains_the_same_model(case: Case, runner: Runner) -> None:
    assert runner.result(case).problems == {}


def test_the_matrix_has_every_hard_case() -> None:
    """What a newcomer would look for in it."""
    whole = matrix()
    assert {case.size for case in whole.cases} == {1, 2, 3, 4, 6, 8}
    assert {case.features for case in whole.cases} == {case.features for case in CASES}
    pairs = {name for case in whole.cases for name in proved.pair_names(whole.signature(case), whole.features(case))}
    for pair in (
        "vocabulary padded | tensor >1 with sequence_parallel",
        "tie_word_embeddings on | pipeline 1f1b",
        "tie_word_embeddings on | pipeline dualpipev",
        "key_value_heads fewer than tensor ranks | zero 3",
        "clipping on | pipeline 1f1b",
        "hidden_dropout on | tensor >1 with sequence_parallel",
        "attention_dropout on | recompute full",
        "documents apart | data >1",
        "stages uneven | pipeline dualpipev",
        "z_loss on | precision bf16",
    ):
        assert pair in pairs
    batches = [GLOBAL_BATCH // (case.micro_batch * case.data) for case in whole.cases if case.data < 4]
    assert {1, 2, 4} <= set(batches)


@cache
def reference(case: Case) -> comparison.Expected:
    return expected(case)


ZERO = Case(zero=0)
PLANTS: list[tuple[Any, Case, set[str]]] = [
    (sabotage.a_nudged_weight, ZERO, {"weights of step 0"}),
    (sabotage.swapped_shards, Case(tensor=2), {"weights of step 0", "loss", "gradient"}),
    (sabotage.a_repeated_sample, Case(data=2), {"samples", "loss"}),
    (sabotage.a_drifted_copy, Case(data=2, zero=0), {"copies"}),
    (sabotage.a_loss_of_one_rank, Case(data=2), {"copies", "loss"}),
    (sabotage.a_misreported_loss, ZERO, {"loss"}),
    (sabotage.shifted_labels, ZERO, {"loss", "gradient"}),
    (sabotage.mean_of_micro_batch_means, Case(data=2, micro_batch=4), {"loss", "gradient"}),
    (sabotage.norm_counts_every_copy, Case(tensor=2, zero=0), {"gradient norm", "gradient"}),
    (sabotage.a_scaled_gradient, ZERO, {"gradient", "exp_avg", "exp_avg_sq"}),
    (sabotage.no_reduction_of_input_gradients, Case(tensor=2), {"gradient", "copies"}),
    (sabotage.no_reduction_of_norm_gradients, Case(tensor=2, sequence_parallel=True), {"gradient", "copies"}),
    (sabotage.no_reduction_over_data, Case(data=2, zero=0), {"gradient", "copies"}),
    (sabotage.no_reduction_of_tied_gradients, Case(pipeline=2, features="gpt"), {"gradient", "copies"}),
    (sabotage.norms_decay, ZERO, {"weight"}),
    (sabotage.no_reduction_of_adapters, Case(tensor=2, features="lora"), {"gradient", "copies"}),
    (sabotage.magnitudes_of_one, Case(features="dora"), {"weights of step 0", "loss"}),
    (sabotage.nothing_is_frozen, Case(features="frozen"), {"gradient norm", "weight"}),
    (sabotage.one_rate_for_all, Case(features="dora"), {"weight"}),
    (sabotage.noise_by_row_of_the_batch, Case(data=2, features="lora"), {"loss", "gradient"}),
    (sabotage.a_forgotten_first_moment, ZERO, {"exp_avg", "weight"}),
    (sabotage.a_forgotten_second_moment, ZERO, {"exp_avg_sq", "weight"}),
]
"""Bugs, the layout that each is planted in, and comparisons that must see it."""


@pytest.mark.parametrize(("plant", "case", "seen_by"), PLANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_planted_bugs_are_caught(plant: Any, case: Case, seen_by: set[str]) -> None:
    shares = run_ranks(case.size, partial(comparison.record, plant=plant), case.config(corpus()))
    problems = judge(case.name, shares, reference(case.reference)).problems
    assert seen_by <= set(problems), problems


def test_every_comparison_has_a_bug_that_it_catches() -> None:
    quantities = set(reference(Case()).tolerance)
    assert quantities | {"weights of step 0", "samples", "copies"} == set().union(*(seen for _, _, seen in PLANTS))


def test_a_number_that_nobody_holds_is_missed() -> None:
    [share] = run_ranks(1, comparison.record, Case().config(corpus()))
    assert judge("", [share], reference(Case())).problems == {}
    last = share.states["end"][-1]
    last.numbers = {kind: numbers[:-1] for kind, numbers in last.numbers.items()}
    assert "has numbers that no rank holds" in str(judge("", [share], reference(Case())).problems["copies"])
