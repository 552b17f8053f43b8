"""Rank arithmetic against DeepSpeed's and megatron-core's own, and what a layout refuses."""

import itertools
import os
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megalm.errors import MegalmError
from megalm.layout import Layout, check_model, divisors, nearest

DEGREES = list(itertools.product((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 4, 6)))
degrees = st.integers(1, 16)
# Sizes that share factors with the degrees and with each other more often than any number does.
sizes = st.integers(1, 96)


@pytest.fixture(scope="module", autouse=True)
def _cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported


@given(degrees, degrees, degrees)
def test_ranks_and_coordinates_are_one_to_one(pipeline: int, data: int, tensor: int) -> None:
    layout = Layout(pipeline=pipeline, data=data, tensor=tensor)
    everywhere = list(itertools.product(range(pipeline), range(data), range(tensor)))
    assert [layout.rank(*place) for place in everywhere] == list(range(layout.world_size))
    assert [layout.coordinates(rank) for rank in range(layout.world_size)] == everywhere
    with pytest.raises(AssertionError):
        layout.coordinates(layout.world_size)


def test_ranks_are_numbered_as_deepspeed_numbers_them() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    for pipeline, data, tensor in DEGREES:
        layout = Layout(pipeline=pipeline, data=data, tensor=tensor)
        theirs = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
        assert theirs.world_size() == layout.world_size
        for rank in range(layout.world_size):
            place = theirs.get_coord(rank)
            assert layout.coordinates(rank) == (place.pipe, place.data, place.model)


def test_ranks_are_numbered_as_megatron_core_numbers_them() -> None:
    from megatron.core.parallel_state import RankGenerator

    for pipeline, data, tensor in DEGREES:
        layout = Layout(pipeline=pipeline, data=data, tensor=tensor)
        theirs = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
        tensors, datas, pipelines = range(tensor), range(data), range(pipeline)
        ours = {
            "tp": [[layout.rank(p, d, t) for t in tensors] for p in pipelines for d in datas],
            "dp": [[layout.rank(p, d, t) for d in datas] for p in pipelines for t in tensors],
            "pp": [[layout.rank(p, d, t) for p in pipelines] for d in datas for t in tensors],
        }
        assert {axis: theirs.get_ranks(axis) for axis in ours} == ours


def test_another_order_would_be_noticed() -> None:
    """Negative control: data fastest instead of tensor."""
    from megatron.core.parallel_state import RankGenerator

    theirs = RankGenerator(tp=2, ep=1, dp=2, pp=1, cp=1, order="dp-tp-pp")
    layout = Layout(data=2, tensor=2)
    assert theirs.get_ranks("tp") != [[layout.rank(0, d, t) for t in range(2)] for d in range(2)]


def test_data_parallelism_is_what_is_left() -> None:
    layout = Layout.of(24, tensor=2, pipeline=3)
    assert layout == Layout(pipeline=3, data=4, tensor=2)
    assert layout.describe() == "pipeline 3 x data 4 x tensor 2 = 24 ranks"


def refusal(function: object, *args: object, **options: object) -> str:
    with pytest.raises(MegalmError) as caught:
        function(*args, **options)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_number_of_ranks_that_does_not_factor() -> None:
    assert refusal(Layout.of, 10, tensor=2, pipeline=3) == (
        "parallel.tensor 2 x parallel.pipeline 3 = 6 does not divide the 10 ranks: "
        "start 6 or 12 ranks, or choose degrees whose product divides 10"
    )
    assert "start 6 ranks, or choose" in refusal(Layout.of, 1, tensor=2, pipeline=3)


@given(st.integers(1, 200), degrees, degrees)
def test_the_named_numbers_of_ranks_are_legal_and_nearest(ranks: int, tensor: int, pipeline: int) -> None:
    legal = [n for n in range(1, 600) if n % (tensor * pipeline) == 0]
    if ranks in legal:
        assert Layout.of(ranks, tensor=tensor, pipeline=pipeline).world_size == ranks
        return
    message = refusal(Layout.of, ranks, tensor=tensor, pipeline=pipeline)
    named = [int(n) for n in re.findall(r"\d+", message.split("start ")[1].split(" ranks")[0])]
    assert named and set(named) <= set(legal)
    assert nearest(ranks, legal) in named
    for choice in named:
        Layout.of(choice, tensor=tensor, pipeline=pipeline)


def test_a_batch_that_does_not_split() -> None:
    assert Layout(data=4).accumulation(48, 3) == 4
    assert refusal(Layout(data=4).accumulation, 50, 3) == (
        "train.global_batch_size 50 is not a multiple of train.micro_batch_size 3 x 4 data-parallel ranks = 12: "
        "the nearest legal one is 48"
    )


@given(st.integers(1, 500), st.integers(1, 16), degrees)
def test_the_named_batch_is_legal_and_nearest(batch: int, micro: int, data: int) -> None:
    layout = Layout(data=data)
    if batch % (micro * data) == 0:
        assert layout.accumulation(batch, micro) * micro * data == batch
        return
    choice = int(refusal(layout.accumulation, batch, micro).rpartition(" ")[2])
    assert layout.accumulation(choice, micro) >= 1
    assert abs(choice - batch) == min(abs(n - batch) for n in range(micro * data, 1200, micro * data))


MODEL = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "padded_vocab_size": 128,
    "num_layers": 4,
}


def check(layout: Layout, folds: int = 1, **sizes: int) -> None:
    """check_model; folds: stages per pipeline rank."""
    check_model(layout, stages=layout.pipeline * folds, **(MODEL | sizes))


@pytest.mark.parametrize(
    ("layout", "sizes", "message"),
    [
        (
            Layout(tensor=6),
            {},
            "parallel.tensor 6 does not divide model.num_attention_heads 8: "
            "the nearest degree that serves on 6 ranks is 2",
        ),
        (
            Layout(data=2, tensor=4),
            {"intermediate_size": 66},
            "parallel.tensor 4 does not divide model.intermediate_size 66: "
            "the nearest degree that serves on 8 ranks is 2",
        ),
        (
            Layout(data=5, tensor=8),
            {"num_attention_heads": 40, "num_key_value_heads": 5, "padded_vocab_size": 640, "intermediate_size": 640},
            "parallel.tensor 8 and model.num_key_value_heads 5 do not divide one another: "
            "the nearest degree that serves on 40 ranks is 10",
        ),
        (
            Layout(tensor=8),
            {"padded_vocab_size": 100},
            "parallel.tensor 8 does not divide the padded vocabulary of 100 rows: "
            "set model.pad_vocab_to_multiple_of to a multiple of 8, such as 1024",
        ),
        (
            Layout(pipeline=8),
            {},
            "model.num_layers 4 cannot be cut into 8 pipeline stages: set parallel.pipeline to 4, or add layers",
        ),
        (
            Layout(pipeline=4),
            {"num_layers": 3},
            "model.num_layers 3 cannot be cut into 4 pipeline stages: set parallel.pipeline to 2, or add layers",
        ),
        (
            Layout(pipeline=2),
            {"num_layers": 3, "folds": 2},
            "model.num_layers 3 cannot be cut into 4 pipeline stages: set parallel.pipeline to 1 and "
            "parallel.pipeline_schedule to 1f1b, or add layers",
        ),
    ],
)
def test_models_that_a_layout_cannot_cut(layout: Layout, sizes: dict[str, int], message: str) -> None:
    assert refusal(check, layout, **sizes) == message


def test_models_that_a_layout_can_cut() -> None:
    check(Layout(tensor=4))  # two key-value heads, each held by two ranks
    check(Layout(tensor=2, pipeline=4))
    check(Layout(pipeline=2), folds=2)


@given(tensor=degrees, data=degrees, heads=sizes, groups=sizes, width=sizes, vocabulary=sizes)
def test_the_named_tensor_degree_is_legal_and_nearest(
    tensor: int, data: int, heads: int, groups: int, width: int, vocabulary: int
) -> None:
    assume(heads % groups == 0)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": width,
        "padded_vocab_size": vocabulary,
    }

    def legal(degree: int) -> bool:
        cuts_groups = groups % degree == 0 or degree % groups == 0
        return heads % degree == 0 and width % degree == 0 and vocabulary % degree == 0 and cuts_groups

    layout = Layout(data=data, tensor=tensor)
    if legal(tensor):
        check(layout, **sizes)
        return
    message = refusal(check, layout, **sizes)
    choice = int(message.rpartition(" ")[2])
    if "pad_vocab" in message:
        check(layout, **(sizes | {"padded_vocab_size": -(-vocabulary // choice) * choice}))
        return
    assert legal(choice)
    check(Layout.of(layout.world_size, tensor=choice, pipeline=1), **sizes)
    others = [degree for degree in divisors(layout.world_size) if legal(degree)]
    assert abs(choice - tensor) == min(abs(other - tensor) for other in others)


@given(pipeline=degrees, data=degrees, layers=st.integers(1, 40), folds=st.sampled_from([1, 2]))
def test_the_named_pipeline_degree_is_legal_and_largest(pipeline: int, data: int, layers: int, folds: int) -> None:
    layout = Layout(pipeline=pipeline, data=data)
    if layers >= pipeline * folds:
        check(layout, folds, num_layers=layers)
        return
    message = refusal(check, layout, folds, num_layers=layers)
    choice = int(re.search(r"parallel\.pipeline to (\d+)", message).group(1))  # type: ignore[union-attr]
    again = Layout.of(layout.world_size, tensor=1, pipeline=choice)
    folded = 1 if "1f1b" in message else folds
    assert folded == 1 or choice > 1, "DualPipeV needs two ranks"
    check(again, folded, num_layers=layers)
    assert choice == max([d for d in divisors(layout.world_size) if d * folds <= layers], default=1)
