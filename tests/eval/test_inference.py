"""Logits with what was read remembered equal logits of a pass over everything, for whatever a model may be made of.

Each comparison is repeated with something planted that is wrong, which it must catch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megalm.eval import inference
from megalm.eval.inference import Reading, next_logits
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
from megalm.nn.cache import KeyValueCache
from megalm.nn.config import RopeScaling
from megalm.nn.kernels import Mask

MakeModel = Callable[..., tuple[LayerList, ModelConfig]]

GPT2 = {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "num_key_value_heads": None}
BIASES = dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), True)
CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "all heads": {"num_key_value_heads": None},
    "one key head": {"num_key_value_heads": 1},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "llama3": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32)},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)},
    "normed heads": {"qk_norm": True, "head_dim": 16},
    "window": {"sliding_window": 6},
    "window of one": {"sliding_window": 1},
    "window, plain kernel": {"sliding_window": 9, "attention_backend": "plain"},
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "alibi": {"position": "alibi"},
    "alibi, plain kernel": {"position": "alibi", "attention_backend": "plain"},
    "no positions": {"position": "none"},
    "gpt2": GPT2 | BIASES | {"tie_word_embeddings": True},
}


def rows() -> tuple[list[list[int]], list[list[int]]]:
    """Beginnings of unequal lengths, and what comes then, 20 ids each."""
    draw = torch.Generator().manual_seed(8)
    begun = [torch.randint(0, 257, (length,), generator=draw).tolist() for length in (1, 7, 20, 33)]
    return begun, torch.randint(0, 257, (4, 20), generator=draw).tolist()


def remembered(model: LayerList, context: int = 64) -> torch.Tensor:
    """Logits after every id that comes: [21, 4, padded_vocab]."""
    begun, coming = rows()
    reading = Reading(model, context=context, length=53)
    return torch.stack([reading.read(begun), *(reading.read([[row[i]] for row in coming]) for i in range(20))])


def alone(model: LayerList, context: int = 64) -> torch.Tensor:
    """The same, of each row by itself and from its start."""
    begun, coming = rows()
    whole = [[(before + after[:i])[-context:] for before, after in zip(begun, coming)] for i in range(21)]
    return torch.stack([torch.cat([next_logits(model, [row]) for row in step]) for step in whole])


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second)[..., :257].abs().max().item()


def forget_positions(patch: pytest.MonkeyPatch) -> None:
    original = inference.hidden_states
    patch.setattr(inference, "hidden_states", lambda model, rows, starts=None: original(model, rows))


def forget_a_value(patch: pytest.MonkeyPatch) -> None:
    """The newest but one of every row."""
    original = KeyValueCache.extend

    def extend(self: KeyValueCache, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple:
        begun = self.begun
        keys, values = original(self, k, v, positions)
        if begun:
            places = (positions - 1).clamp(min=0)
            values = values.clone()
            values[torch.arange(len(places))[:, None], places] *= 0.9
        return keys, values

    patch.setattr(KeyValueCache, "extend", extend)


def forget_the_newest(patch: pytest.MonkeyPatch) -> None:
    original = KeyValueCache.extend

    def extend(self: KeyValueCache, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple:
        return original(self, k, v * 0.9 if self.begun else v, positions)

    patch.setattr(KeyValueCache, "extend", extend)


def see_all(patch: pytest.MonkeyPatch) -> None:
    """Queries behind a cache see every key within reach, also those of the padding and those before the window."""
    original = Mask.visible
    patch.setattr(
        Mask,
        "visible",
        lambda self, *sizes: (
            original(self, *sizes) if self.query_positions is None else original(Mask(kind="full"), *sizes)
        ),
    )


def widen(patch: pytest.MonkeyPatch) -> None:
    original = Mask.visible
    patch.setattr(
        Mask,
        "visible",
        lambda self, *sizes: original(
            self if self.query_positions is None or not self.window else replace(self, window=self.window + 1), *sizes
        ),
    )


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_remembered(case: str, make_model: MakeModel) -> None:
    model, _ = make_model(**CASES[case])
    expected = alone(model)
    assert expected[..., :257].std() > 0.5
    assert difference(remembered(model), expected) < 1e-5
    mistakes = [forget_positions, see_all, forget_a_value]
    if CASES[case].get("sliding_window"):
        mistakes += [widen]
    if case == "window of one":  # which sees nothing but itself
        mistakes = [see_all, widen, forget_the_newest]
    for mistake in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch)
            assert difference(remembered(model), expected) > 1e-3, mistake.__name__


def test_beyond_the_context_the_last_ids_are_read_anew(make_model: MakeModel) -> None:
    model, _ = make_model()
    assert difference(remembered(model, context=40), alone(model, context=40)) < 1e-5
    assert difference(remembered(model, context=41), alone(model, context=40)) > 1e-3


def test_rows_may_be_dropped(make_model: MakeModel) -> None:
    model, _ = make_model()
    begun, coming = rows()
    reading = Reading(model, context=64, length=53)
    reading.read(begun)
    reading.keep([3, 1])
    assert difference(reading.read([coming[3][:1], coming[1][:1]]), alone(model)[1][[3, 1]]) < 1e-5


def test_rows_go_on_after_one_that_outgrew_the_context(make_model: MakeModel) -> None:
    """Keys and values are kept again once it has ended."""
    model, _ = make_model()
    long, short, other = [5] * 14, [1, 2, 3], [9, 8]
    reading = Reading(model, context=16, length=64)
    reading.read([long, short, other])
    for token in (10, 11, 12):
        reading.read([[token]] * 3)
        long, short, other = ([*row, token] for row in (long, short, other))
    assert len(long) > 16
    reading.keep([1, 2])
    passes = []
    original = KeyValueCache.extend

    def extend(self: KeyValueCache, k: torch.Tensor, *rest: torch.Tensor) -> tuple:
        passes.append(k.shape[1])
        return original(self, k, *rest)

    for token in (20, 21, 22):
        short, other = ([*row, token] for row in (short, other))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeyValueCache, "extend", extend)
            found = reading.read([[token]] * 2)
        assert difference(found, torch.cat([next_logits(model, [row]) for row in (short, other)])) < 1e-4
    assert passes == [7, 7, 1, 1, 1, 1], "two layers: all of the longer row, then a token at a time"


def test_two_readings_of_one_model_do_not_meet(make_model: MakeModel) -> None:
    model, _ = make_model()
    begun, coming = rows()
    first, second = (Reading(model, context=64, length=53) for _ in range(2))
    first.read(begun)
    second.read(begun[::-1])
    assert difference(first.read([row[:1] for row in coming]), alone(model)[1]) < 1e-5
    assert difference(next_logits(model, begun[:1]), alone(model)[0][:1]) < 1e-5


def test_a_generation_of_bf16_weights_is_near(make_model: MakeModel) -> None:
    """Another kernel computes the first pass there."""
    model, _ = make_model()
    model.to(torch.bfloat16)
    assert difference(remembered(model), alone(model)) < 0.3 < 0.1 * alone(model)[..., :257].abs().max()
