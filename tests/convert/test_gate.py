"""What the gate lets through is right: each mistake that a table could hold is planted, and fails the command."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.convert import architectures, conversion, gate, tokenizer_files
from megalm.convert.architectures import ARCHITECTURES, Architecture
from megalm.convert.conversion import from_hf, to_hf
from megalm.convert.mapping import Fused, FusedByHead, Key, Rope, Same, Transposed, Vocabulary
from megalm.errors import MegalmError
from tests.convert import models

# Of each architecture, a model in which nothing is at a value that hides a mistake.
SUBJECTS = {
    "llama": "llama-biases-tied",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3-biases",
    "gpt2": "gpt2-untied",
    "gpt_neox": "gpt-neox",
}


class Untransposed(Same):
    """A missing transpose."""

    def export(self, tensors: Any, config: Any) -> Tensor:
        return tensors[0]


class HeadsApart(FusedByHead):
    """All queries, then all keys, then all values, where they should alternate by heads."""

    def export(self, tensors: Any, config: Any) -> Tensor:
        return torch.cat(list(tensors))


class Shifted(Vocabulary):
    """Rows off by one."""

    def export(self, tensors: Any, config: Any) -> Tensor:
        return tensors[0][: config.vocab_size].roll(1, 0)


class WrongTheta(Rope):
    def write(self, ours: Any) -> dict[str, Any]:
        return super().write(dict(ours) | {"rope_theta": ours["rope_theta"] * 1.5})


class WrongKey(Key):
    def write(self, ours: Any) -> dict[str, Any]:
        return {self.theirs: {"norm_eps": 0.3, "sliding_window": 9, "parallel_residual": False}[self.ours]}


def mistakes(architecture: Architecture, config: Any) -> Iterator[tuple[str, Architecture]]:
    """Tables with one mistake each."""
    shapes = architectures.their_shapes(architecture, config)

    def shape(mapping: Any) -> Any:
        return [shapes.get(f"{mapping.theirs}.{suffix}".replace("*", "0")) for suffix in ("weight", "bias")]

    tensors = list(architecture.tensors)
    for one, other in combinations(range(len(tensors)), 2):
        first, second = tensors[one], tensors[other]
        if type(first) is type(second) and ("*" in first.theirs) == ("*" in second.theirs):
            if shape(first) != shape(second) or shape(first)[0] is None:
                continue
            swapped = list(tensors)
            swapped[one] = replace(first, theirs=second.theirs)
            swapped[other] = replace(second, theirs=first.theirs)
            yield f"{first.theirs} and {second.theirs} swapped", replace(architecture, tensors=swapped)
    for place, mapping in enumerate(tensors):
        wrong: Any = None
        if type(mapping) is Transposed and shape(mapping)[0][0] == shape(mapping)[0][1]:
            wrong = Untransposed(mapping.ours, mapping.theirs)
        elif isinstance(mapping, Fused):
            query, key, value = mapping.ours
            wrong = replace(mapping, ours=(key, query, value))
        elif isinstance(mapping, Vocabulary) and shape(mapping)[0]:
            wrong = Shifted(mapping.ours, mapping.theirs)
        if wrong:
            yield (
                f"{mapping.theirs} wrong",
                replace(architecture, tensors=[*tensors[:place], wrong, *tensors[place + 1 :]]),
            )
        if isinstance(mapping, FusedByHead):
            apart = HeadsApart(mapping.ours, mapping.theirs)
            yield (
                f"{mapping.theirs} apart",
                replace(architecture, tensors=[*tensors[:place], apart, *tensors[place + 1 :]]),
            )
    keys = list(architecture.keys)
    for place, key in enumerate(keys):
        bad: Any = None
        if isinstance(key, Rope):
            bad = WrongTheta(key.theta, key.fraction, key.share)
        elif isinstance(key, Key) and key.ours in ("norm_eps", "sliding_window", "parallel_residual"):
            bad = WrongKey(key.ours, key.theirs)
        if bad:
            yield f"{key} wrong", replace(architecture, keys=[*keys[:place], bad, *keys[place + 1 :]])


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("subjects")
    return {
        kind: models.checkpoint(folder / kind, *models.build(**models.MODELS[name][1]), tokenizer_path, tensor=2)
        for kind, name in SUBJECTS.items()
    }


@pytest.mark.parametrize("kind", SUBJECTS)
def test_each_mistake_is_caught(
    kind: str, subjects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = next(known for known in ARCHITECTURES if known.model_type == kind)
    config = models.build(**models.MODELS[SUBJECTS[kind]][1])[1]
    planted = list(mistakes(architecture, config))
    assert len(planted) > 4
    for what, wrong in planted:
        monkeypatch.setattr(architectures, "of_model", lambda config, wrong=wrong: wrong)
        with pytest.raises(MegalmError, match="compute different logits") as raised:
            to_hf(subjects[kind], tmp_path / "hf")
            pytest.fail(f"passed with {what}")
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.iterdir()), "a folder is left"


def test_the_other_direction_is_judged_too(
    subjects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_hf(subjects["gpt_neox"], tmp_path / "hf", verify=False)
    wrong = lambda self, tensor, config: [part.contiguous() for part in tensor.chunk(3)]  # noqa: E731
    monkeypatch.setattr(FusedByHead, "restore", wrong)
    with pytest.raises(MegalmError, match="compute different logits"):
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_tensors_that_transformers_does_not_expect_are_caught(
    change: str, subjects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = conversion.write_shard

    def altered(path: Path, planned: Any, make: Any, *rest: Any) -> None:
        first, *others = planned
        if change == "missing":
            write(path, others, make, *rest)
        elif change == "unexpected":
            write(
                path,
                [*planned, replace(first, name="model.extra")],
                lambda n: make(n.replace("model.extra", first.name)),
                *rest,
            )
        else:
            rows, *width = first.shape
            write(
                path,
                [replace(first, shape=(rows - 1, *width)), *others],
                lambda n: make(n)[: -1 if n == first.name else None],
                *rest,
            )

    monkeypatch.setattr(conversion, "write_shard", altered)
    with pytest.raises(MegalmError, match=rf"{change}|cannot load"):
        to_hf(subjects["qwen3"], tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "option", "words"),
    [
        (float("nan"), None, "is not finite: choose another checkpoint"),
        (7e4, "fp16", "overflows in float16: choose --dtype bf16 or fp32"),
    ],
)
def test_weights_that_are_no_numbers(
    value: float, option: str | None, words: str, tmp_path: Path, tokenizer_path: Path
) -> None:
    model, config = models.build()
    with torch.no_grad():
        model.named_weights()["blocks.1.attention.key.weight"][3, 4] = value
    step = models.checkpoint(tmp_path / "run", model, config, tokenizer_path)
    with pytest.raises(MegalmError, match=f"the weight blocks.1.attention.key.weight {words}"):
        to_hf(step, tmp_path / "hf", dtype=option, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_logits_that_are_no_numbers(tmp_path: Path, tokenizer_path: Path) -> None:
    model, config = models.build()
    with torch.no_grad():
        model.named_weights()["head.weight"].fill_(3e38)
    step = models.checkpoint(tmp_path / "run", model, config, tokenizer_path)
    with pytest.raises(MegalmError, match="not finite"):
        to_hf(step, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_tokenizer_is_caught(
    subjects: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = tokenizer_files._merges
    monkeypatch.setattr(tokenizer_files, "_merges", lambda scores: merges(scores)[::-1])
    with pytest.raises(MegalmError, match="other ids"):
        to_hf(subjects["llama"], tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_what_other_libraries_say_of_themselves_stays_out(caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    with gate._quiet(transformers):
        logging.getLogger("torchao").warning("Failed to load a kernel")
    logging.getLogger("torchao").warning("afterwards it speaks again")
    assert caplog.messages == ["afterwards it speaks again"]
