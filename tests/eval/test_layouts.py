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
from megalm.eval.generate import Sampling, collect, generate
from megalm.eval.load import load_model
from megalm.eval.scoring import score
from megalm.layout import Layout
from megalm.models import stage
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
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


def share_the_first(patch: pytest.MonkeyPatch, at: int) -> None:
    """Each stage believes in its own logits."""
    from megalm.parallel.inference import Pipe

    patch.setattr(Pipe, "share", lambda self, logits: logits if self.stage else logits.zero_())


def on_ranks(folders: list[Path], layout: Layout, mistake: Callable[[pytest.MonkeyPatch, int], None] | None) -> Any:
    """What this rank hears of each checkpoint's model."""
    from megalm.parallel.inference import join

    place = join("cpu", tensor=layout.tensor, pipeline=layout.pipeline)
    heard = []
    for folder in folders:
        read: list[tuple[str, int]] = []
        original = Reader.stretch

        def stretch(self: Reader, name: str, *cut: Any, original: Any = original, read: Any = read) -> torch.Tensor:
            read.append((name, cut[-1]))
            return original(self, name, *cut)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reader, "stretch", stretch)
            if mistake:
                mistake(patch, place.groups.rank)
            loaded = load_model(folder, layers=place.layers, pipe=place.pipe, ranks=place.groups)
            heard.append(say(*loaded))
        heard[-1].read = read
        assert [name for name, _ in read] == [*loaded[0].named_weights()]
    place.leave()
    return heard


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
    results = on_four_ranks(on_ranks, folders, layout, None)
    for case, *ranks in zip(chosen, *results, strict=True):
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
        tied = config.tie_word_embeddings and layout.pipeline > 1
        assert twice == (["embedding.table.weight"] if tied else []), case
        assert not tied or twice[0] in stages[0] & stages[-1]

    # negative controls
    case, said = chosen[0], results[0][0]
    other, _ = make_model(**changes(case, layout) | {"norm_eps": 1e-3})
    assert difference(torch.from_numpy(said.logits), alone(other)) > 1e-4
    for mistake in (swap_blocks, share_the_first, forget_on_the_last)[0 if layout.pipeline > 1 else 2 :]:
        wrong = [heard[0] for heard in on_four_ranks(on_ranks, folders[:1], layout, mistake)]
        assert max(difference(torch.from_numpy(each.logits), alone(models[case][0])) for each in wrong) > 1e-3
        assert any(each.texts != said.texts for each in wrong), mistake.__name__
