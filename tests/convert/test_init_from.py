"""Training that starts from a Hugging Face folder or a checkpoint, at any layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.tensors import read_weights
from megalm.convert.conversion import from_hf, to_hf
from megalm.convert.sources import CheckpointSource, FolderSource, open_source
from megalm.convert.start import open_start
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.tokenizer.load import load
from megalm.training import resume
from megalm.training.config import RunConfig
from tests.convert import models
from tests.distributed.ranks import run_ranks
from tests.training.conftest import build_corpus, tree_of
from tests.training.runs import curve, train_run, whole_state

SHAPE = {"num_key_value_heads": 2, "num_layers": 4, "init_std": 0.05}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def origin(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a Hugging Face folder; step-20: the checkpoint that it was made of, of tensor 2 x pipeline 2."""
    folder = tmp_path_factory.mktemp("origin")
    step = models.checkpoint(folder, *models.build(**SHAPE), corpus / "tokenizer", tensor=2, pipeline=2)
    to_hf(step, folder / "hf", verify=False)
    return folder


def tree(corpus: Path, directory: Path, source: Path, **sections: Any) -> dict[str, Any]:
    made = tree_of(corpus, directory, **sections)
    made["train"] |= {"steps": 2}
    made["schedule"] = {"total_steps": 8, "warmup_steps": 2}
    made["optimizer"] = {"learning_rate": 1e-30, "weight_decay": 0.0} | sections.get("optimizer", {})
    made["model"] = models.SIZES | SHAPE | {"init_from": str(source)} | sections.get("model", {})
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(read_weights(folder, manifests.read(folder)))


@pytest.mark.parametrize(
    ("size", "parallel", "source"),
    [
        (1, {"zero": 0}, "hf"),
        (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "hf"),
        (2, {"zero": 3}, "step-20"),
    ],
)
def test_a_run_starts_from_the_weights(
    size: int, parallel: dict[str, Any], source: str, corpus: Path, origin: Path, tmp_path: Path
) -> None:
    """Learning at a rate that changes nothing, it saves them as they were, bit for bit."""
    made = tree(corpus, tmp_path / "run", origin / source, parallel=parallel)
    assert run_ranks(size, train_run, made) == [0] * size
    saved = whole_state(made, 2)
    for name, weight in weights(origin / "step-20").items():
        assert torch.equal(saved[f"{name}/weight"], weight), name
    said = (tmp_path / "run" / "said.txt").read_text()
    assert f"the weights are those of {origin / source}" in said
    manifest = manifests.read(tmp_path / "run" / "checkpoints" / "step-2")
    assert manifest.config["model"]["init_from"] == str(origin / source)
    if size == 1:
        # the first loss is the model's, not a random one's
        fresh = tree(corpus, tmp_path / "fresh", origin / source)
        del fresh["model"]["init_from"]
        run_ranks(1, train_run, fresh)
        assert curve(made)[0]["loss"] != pytest.approx(curve(fresh)[0]["loss"], rel=1e-3)
        # resumed, it does not look there again
        made["train"]["steps"] = 3
        made["model"]["init_from"] = str(tmp_path / "gone")
        assert run_ranks(1, train_run, made) == [0]
        assert [record["step"] for record in curve(made)] == [1, 2, 3]


def train_without_one_weight(tree: dict[str, Any]) -> int:
    every = resume._pieces
    resume._pieces = lambda *rest: (piece for piece in every(*rest) if piece.name != "blocks.1.attention.key.weight")
    return train_run(tree)


@pytest.mark.parametrize(("size", "parallel"), [(1, {"zero": 0}), (2, {"zero": 3}), (2, {"pipeline": 2})])
def test_a_weight_that_is_forgotten_is_an_error(
    size: int, parallel: dict[str, Any], corpus: Path, origin: Path, tmp_path: Path
) -> None:
    """Weights that come from elsewhere are not drawn first, so that none that looks right can be left."""
    made = tree(corpus, tmp_path / "run", origin / "hf", parallel=parallel)
    assert run_ranks(size, train_without_one_weight, made) == [3] * size
    assert "step 1: loss nan" in (tmp_path / "run" / "said.txt").read_text()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "llama-biases-tied"])
def test_every_stretch_of_every_source(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    """Whatever part of a slice is asked for, and with other rows that pad the vocabulary."""
    model, config = models.build(**models.MODELS[name][1])
    step = models.checkpoint(tmp_path, model, config, tokenizer_path, tensor=2, data=2)
    to_hf(step, tmp_path / "hf", verify=False)
    draw = torch.Generator().manual_seed(0)
    for source in (open_source(step), open_source(tmp_path / "hf")):
        assert isinstance(source, CheckpointSource if source.path == step else FolderSource)
        with source:
            for weight, whole in model.named_weights().items():
                if weight in ("embedding.table.weight", "head.weight"):
                    whole = torch.cat((whole, torch.zeros(128, whole.shape[1])))
                dim = models.cut(weight)
                for size in (1, 2, 4) if dim is not None else (1,):
                    for rank, part in enumerate(whole.chunk(size, dim or 0)):
                        first, last = sorted(torch.randint(0, part.numel() + 1, (2,), generator=draw).tolist())
                        got = source.stretch(weight, tuple(whole.shape), dim, rank, size, first, last - first)
                        assert torch.equal(got, part.flatten()[first:last]), (source.path, weight, rank, size)


REFUSED = {
    "hidden_size": (64, "is a model with hidden_size=48 and the config says 64: set model.hidden_size=48"),
    "num_layers": (2, "set model.num_layers=4"),
    "vocab_size": (640, "set model.vocab_size=600"),
    "rope_theta": (
        5e5,
        r"set model.rope_theta=10000.0, or allow it with checkpoint.allow_changes=\[model.rope_theta\]",
    ),
    "qk_norm": (True, "set model.qk_norm=False"),
    "tie_word_embeddings": (True, "set model.tie_word_embeddings=False"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_model_is_refused(key: str, corpus: Path, origin: Path) -> None:
    value, sentence = REFUSED[key]
    config = ModelConfig(**models.SIZES | SHAPE | {key: value})
    tokenizer = load(corpus / "tokenizer")
    for source in ("hf", "step-20"):
        with pytest.raises(MegalmError, match=sentence):
            open_start(origin / source, config, tokenizer, [])
    if "allow" in sentence:
        open_start(origin / "hf", config, tokenizer, [f"model.{key}"])


def test_other_weights_and_ids_are_refused(corpus: Path, origin: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    config, tokenizer = ModelConfig(**models.SIZES | SHAPE), load(corpus / "tokenizer")
    for source in ("hf", "step-20"):
        with pytest.raises(MegalmError, match="data.tokenizer is not the tokenizer of model.init_from"):
            open_start(origin / source, config, load(tokenizer_path), [])
    with pytest.raises(MegalmError, match="does not exist: name a Hugging Face folder, a run folder or"):
        open_start(tmp_path / "none", config, tokenizer, [])
    with pytest.raises(MegalmError, match="holds no whole checkpoint"):
        open_start(tmp_path, config, tokenizer, [])
    from_hf(origin / "hf", tmp_path / "imported", verify=False)
    open_start(tmp_path / "imported", config, tokenizer, [])
    learned, _ = models.build(position="learned")
    step = models.checkpoint(tmp_path / "learned", learned, _, corpus / "tokenizer")
    with pytest.raises(MegalmError, match="a table of 64 positions: set model.max_position_embeddings=64"):
        longer = _.model_copy(update={"max_position_embeddings": 128})
        open_start(step, longer, tokenizer, ["model.max_position_embeddings"])


def test_a_head_keeps_its_classes(tokenizer_path: Path, tmp_path: Path) -> None:
    """Of a checkpoint, of a Hugging Face folder and of one that was imported; a head without names takes any."""
    model, config = models.build(**SHAPE, head="sequence_classification", num_labels=3)
    tokenizer, names = load(tokenizer_path), ["no", "perhaps", "yes"]
    for folder, blend in ((tmp_path / "named", {"labels": names}), (tmp_path / "unnamed", {})):
        step = models.checkpoint(folder, model, config, tokenizer_path, blend=blend)
        to_hf(step, folder / "hf", verify=False)
        from_hf(folder / "hf", folder / "imported", verify=False)
        for source in (step, folder / "hf", folder / "imported"):
            open_start(source, config, tokenizer, [], names)
            for other in (["perhaps", "yes", "no"], ["no", "often", "yes"]):
                if not blend:
                    open_start(source, config, tokenizer, [], other)
                    continue
                with pytest.raises(MegalmError, match=r'in the old order, \["no", "perhaps", "yes"\], or start from'):
                    open_start(source, config, tokenizer, [], other)
    base = models.checkpoint(tmp_path / "base", *models.build(**SHAPE), tokenizer_path)
    open_start(base, config, tokenizer, [], names)


def test_the_key_is_a_key_of_the_config(corpus: Path, tmp_path: Path, origin: Path) -> None:
    made = RunConfig.model_validate(tree(corpus, tmp_path, origin / "hf"))
    assert json.loads(made.model_dump_json())["model"]["init_from"] == str(origin / "hf")
