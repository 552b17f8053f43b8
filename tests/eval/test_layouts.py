"""A model cut over tensor-parallel ranks and pipeline stages, and copied over data-parallel ones, says what it says in
one process: logits, log-likelihoods and texts, token by token and with what came before remembered.

Each comparison is repeated with something planted that is wrong, which it must catch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.tensors import Reader
from megalm.errors import MegalmError
from megalm.eval.generate import Sampling, collect, generate
from megalm.eval.load import load_model
from megalm.eval.scoring import score
from megalm.layout import Layout
from megalm.models import stage
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, decoder
from megalm.models.stage import stages_of
from megalm.nn.layers import Layers
from megalm.tokenizer.base import Tokenizer
from tests.eval.test_inference import CASES, alone, difference, forget_a_value, remembered, rows

LAYOUTS = [
    Layout(tensor=2, data=2),
    Layout(pipeline=2, data=2),
    Layout(pipeline=2, tensor=2),
    Layout(pipeline=4),
]
CUT = ["grouped", "all heads", "one key head", "normed heads", "window", "alibi", "gpt2"]
STAGED = ["grouped", "window", "alibi", "gpt2"]


def cases(layout: Layout) -> list[str]:
    """Stages change nothing within a layer: what is between layers, and what is tied, is enough for them."""
    return STAGED if layout.pipeline > 1 else CUT


def changes(case: str, layout: Layout) -> dict[str, Any]:
    """An odd number of layers where it can be: stages are then unequal."""
    return CASES[case] | {"num_layers": {1: 2, 2: 3, 4: 5}[layout.pipeline]}


@dataclass
class Said:
    """logits: [21, 4, padded_vocab], as an array: a tensor would be fetched from its process, which may be gone by
    then. scores: nats of four continuations. read: the weights that were read from the checkpoint to say it."""

    logits: np.ndarray
    scores: list[float]
    texts: list[str]
    read: list[tuple[str, int]]


def say(model: LayerList, config: ModelConfig, tokenizer: Tokenizer) -> Said:
    prompts, continuations = rows()
    texts = []
    for sampling in (Sampling(0), Sampling(0.9, top_k=50, min_p=0.01, repetition_penalty=1.1)):
        texts += collect(generate(model, config, tokenizer, prompts, sampling=sampling, max_new_tokens=12), 4)
    scores = [each.loglikelihood for each in score(model, list(zip(prompts, continuations, strict=True)))]
    return Said(remembered(model).numpy(), scores, texts, [])


def swap_blocks(patch: pytest.MonkeyPatch, at: int) -> None:
    """The first block is on the last stage, and the last one on the first."""
    original = stage.stages_of

    def stages_of(specs: Any, stages: int) -> list[int]:
        places = original(specs, stages)
        blocks = [index for index, spec in enumerate(specs) if spec.name.startswith("blocks.")]
        places[blocks[0]], places[blocks[-1]] = places[blocks[-1]], places[blocks[0]]
        return places

    patch.setattr(stage, "stages_of", stages_of)


def forget_on_the_last(patch: pytest.MonkeyPatch, at: int) -> None:
    """A stage alone loses a little of what it remembers."""
    if at == 3:
        forget_a_value(patch)


def shift_tokens(patch: pytest.MonkeyPatch, at: int) -> None:
    """Each token's hidden states come to the next stage in the place of its neighbour's."""
    from megalm.parallel.inference import Pipe

    original = Pipe.send
    patch.setattr(Pipe, "send", lambda self, hidden: original(self, hidden.roll(1, 0)))


def on_ranks(
    folders: list[Path], layout: Layout, mistakes: list[Callable[[pytest.MonkeyPatch, int], None]]
) -> tuple[list[Said], list[np.ndarray]]:
    """What this rank hears of each checkpoint's model, and the first one's logits under each mistake."""
    from megalm.parallel.inference import join

    place = join("cpu", tensor=layout.tensor, pipeline=layout.pipeline)
    where = {"layers": place.layers, "pipe": place.pipe, "ranks": place.groups}
    heard, wrong = [], []
    for folder in folders:
        read: list[tuple[str, int]] = []
        original = Reader.stretch

        def stretch(self: Reader, name: str, *cut: Any, original: Any = original, read: Any = read) -> torch.Tensor:
            read.append((name, cut[-1]))
            return original(self, name, *cut)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reader, "stretch", stretch)
            loaded = load_model(folder, **where)
        assert [name for name, _ in read] == [*loaded[0].named_weights()]
        heard.append(say(*loaded))
        heard[-1].read = read
    for mistake in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch, place.groups.rank)
            wrong.append(remembered(load_model(folders[0], **where)[0]).numpy())
    place.leave()
    return heard, wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_every_rank_says_the_same(
    layout: Layout,
    make_model: Callable[..., tuple[LayerList, ModelConfig]],
    make_checkpoint: Callable[..., Path],
    on_four_ranks: Callable[..., list[Any]],
    tokenizer_path: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    chosen = cases(layout)
    models = {case: make_model(**changes(case, layout)) for case in chosen}
    folders = [  # as other layouts wrote them
        make_checkpoint(
            tmp_path / str(number), *built, tokenizer_path, tensor=1 + number % 2, pipeline=1 + number // 2 % 2
        )
        for number, built in enumerate(models.values())
    ]
    staged = layout.pipeline > 1
    mistakes = [forget_on_the_last, *([swap_blocks, shift_tokens] if staged else [])]
    heard, wrong = zip(*on_four_ranks(on_ranks, folders, layout, mistakes), strict=True)
    for case, *ranks in zip(chosen, *heard, strict=True):
        model, config = models[case]
        expected, logits = say(model, config, tokenizer), alone(model)
        sizes = {name: weight.numel() for name, weight in model.named_weights().items()}
        for said in ranks:
            assert difference(torch.from_numpy(said.logits), logits) < 1e-5, case
            assert said.scores == pytest.approx(expected.scores, abs=1e-4), case  # of 20 ids
            assert said.texts == expected.texts, case
            assert sum(count for _, count in said.read) < 0.8 * sum(sizes.values()), case
            assert np.array_equal(said.logits, ranks[0].logits), "ranks that differ by a bit may choose otherwise"
        stages = [{name for name, _ in ranks[layout.rank(at, 0, 0)].read} for at in range(layout.pipeline)]
        assert set().union(*stages) == {*sizes}
        twice = [name for name in sizes if sum(name in held for held in stages) > 1]
        tied = config.tie_word_embeddings and staged
        assert twice == (["embedding.table.weight"] if tied else []), case
        assert not tied or twice[0] in stages[0] & stages[-1]

    # negative controls
    case = chosen[0]
    expected = alone(models[case][0])
    for mistake, *ranks in zip(mistakes, *wrong, strict=True):
        assert max(difference(torch.from_numpy(logits), expected) for logits in ranks) > 1e-3, mistake.__name__
    other, config = make_model(**changes(case, layout) | {"norm_eps": 0.1})
    said = heard[0][0]
    assert difference(torch.from_numpy(said.logits), alone(other)) > 1e-3
    assert say(other, config, tokenizer).texts != said.texts


def test_layers_are_shared_out_in_order() -> None:
    def shares(layers: int, stages: int, **changes: Any) -> list[int]:
        config = ModelConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_layers=layers, **changes)
        return stages_of(decoder(config, Layers(), seed=0), stages)

    assert shares(2, 2) == [0, 0, 1, 1, 1]
    assert shares(5, 2, position="learned") == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert shares(3, 3) == [0, 0, 1, 2, 2, 2]
    assert shares(4, 1) == [0] * 7


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tensor": 2}, "parallel.tensor 2 x parallel.pipeline 1 = 2 does not divide the 3 ranks: start 2 or 4 ranks"),
        ({"pipeline": 2}, "parallel.tensor 1 x parallel.pipeline 2 = 2 does not divide the 3 ranks"),
        ({"pipeline": 0}, "the pipeline degree 0 is not 1 or more"),
    ],
    ids=str,
)
def test_degrees_that_do_not_fit_the_ranks_are_refused(
    degrees: dict[str, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalm.parallel.inference import join

    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(2):  # of which one says it
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(MegalmError, match=words) as refused:
            join("cpu", **degrees)
        assert refused.value.echo == (rank > 0)


def test_more_stages_than_layers_are_refused(
    make_model: Callable[..., tuple], make_checkpoint: Callable[..., Path], tokenizer_path: Path, tmp_path: Path
) -> None:
    class Three:
        stage, stages = 0, 3

    make_checkpoint(tmp_path, *make_model(), tokenizer_path)
    pipe: Any = Three()
    with pytest.raises(MegalmError, match=r"step-20 has 2 layers and cannot be cut into 3 .*: choose .* 2 or less"):
        load_model(tmp_path, pipe=pipe)
