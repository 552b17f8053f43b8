"""A model comes back from a checkpoint of any layout, and what is not whole or not its own is refused."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.checkpoint import manifest as manifests
from megalm.errors import MegalmError
from megalm.eval.inference import next_logits
from megalm.eval.load import load_model
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList, build_model
from megalm.tokenizer.base import Tokenizer

MakeModel = Callable[..., tuple[LayerList, ModelConfig]]
MakeCheckpoint = Callable[..., Path]


def same(first: LayerList, second: LayerList) -> bool:
    ours, theirs = first.named_weights(), second.named_weights()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: MakeModel, make_checkpoint: MakeCheckpoint, tokenizer_path: Path) -> Path:
    return make_checkpoint(tmp_path / "run" / "checkpoints", *make_model(), tokenizer_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 2)])
def test_weights_come_back_whole(
    tmp_path: Path,
    make_model: MakeModel,
    make_checkpoint: MakeCheckpoint,
    tokenizer_path: Path,
    tokenizer: Tokenizer,
    pipeline: int,
    tensor: int,
    tied: bool,
) -> None:
    model, config = make_model(tie_word_embeddings=tied)
    folder = make_checkpoint(
        tmp_path / "run" / "checkpoints", model, config, tokenizer_path, pipeline=pipeline, tensor=tensor
    )
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", str(folder)):
        loaded, loaded_config, loaded_tokenizer = load_model(path)
        assert same(loaded, model)
        assert loaded_config == config
        assert loaded_tokenizer.fingerprint == tokenizer.fingerprint
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(next_logits(loaded, [[1, 2, 3]]), next_logits(model, [[1, 2, 3]]))
    if tied:
        assert loaded.layer("head").weight is loaded.layer("embedding").table.weight


def test_the_newest_checkpoint_of_a_run_is_read(
    tmp_path: Path, make_model: MakeModel, make_checkpoint: MakeCheckpoint, tokenizer_path: Path
) -> None:
    model, config = make_model()
    make_checkpoint(tmp_path, model, config, tokenizer_path, step=9)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    make_checkpoint(tmp_path, model, config, tokenizer_path, step=10)
    assert same(load_model(tmp_path)[0], model)
    assert not same(load_model(tmp_path / "step-9")[0], model)


def test_dtype(
    tmp_path: Path, make_model: MakeModel, make_checkpoint: MakeCheckpoint, tokenizer_path: Path, checkpoint: Path
) -> None:
    model, config = make_model()
    assert {p.dtype for p in load_model(checkpoint)[0].parameters()} == {torch.float32}
    model.to(torch.bfloat16)
    make_checkpoint(tmp_path / "bf16", model, config, tokenizer_path)
    loaded = load_model(tmp_path / "bf16")[0]
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and same(loaded, model)
    wide = load_model(tmp_path / "bf16", dtype=torch.float32)[0]
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and same(wide, model.float())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_nothing_is_allocated_before_the_dtype_is_known(
    tmp_path: Path,
    make_model: MakeModel,
    make_checkpoint: MakeCheckpoint,
    tokenizer_path: Path,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp32 first, a model would need twice the memory of its bf16 weights."""
    model, config = make_model(tie_word_embeddings=tied)
    make_checkpoint(tmp_path, model.to(torch.bfloat16), config, tokenizer_path)
    built = []

    def build(*arguments: Any, **options: Any) -> LayerList:
        built.append(build_model(*arguments, **options))
        assert all(parameter.is_meta for parameter in built[0].parameters())
        return built[0]

    monkeypatch.setattr("megalm.eval.load.build_model", build)
    loaded, _, _ = load_model(tmp_path)
    assert built and same(loaded, model)
    assert (loaded.layer("head").weight is loaded.layer("embedding").table.weight) == tied


def test_kernels_of_the_machine_that_trained_are_not_needed(
    tmp_path: Path, make_model: MakeModel, make_checkpoint: MakeCheckpoint, tokenizer_path: Path
) -> None:
    model, config = make_model()
    trained = config.model_copy(update={"attention_backend": "flash3", "norm_implementation": "apex"})
    make_checkpoint(tmp_path, model, trained, tokenizer_path)
    loaded, loaded_config, _ = load_model(tmp_path)
    assert loaded_config == config
    assert torch.equal(next_logits(loaded, [[1, 2, 3]]), next_logits(model, [[1, 2, 3]]))


def test_a_model_that_writes_no_text_is_refused(
    tmp_path: Path, make_model: MakeModel, make_checkpoint: MakeCheckpoint, tokenizer_path: Path
) -> None:
    model, config = make_model()
    classes = config.model_copy(update={"head": "sequence_classification", "num_labels": 3})
    make_checkpoint(tmp_path, model, classes, tokenizer_path)
    with pytest.raises(MegalmError, match="step-20 has a head for sequence classification and writes no text: tools/"):
        load_model(tmp_path)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (Path.unlink, "weights-rank-00000.safetensors", "is missing"),
        (alter, "weights-rank-00000.safetensors", "was altered"),
        (append, "moments-rank-00000.safetensors", r"holds \d+ bytes instead of \d+"),
    ],
    ids=["missing weights", "altered weights", "another file's size"],
)
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, damage: Callable[[Path], None], file: str, words: str
) -> None:
    damage(checkpoint / file)
    with pytest.raises(MegalmError, match=f"{checkpoint} is damaged: {file} {words}"):
        load_model(checkpoint)


def test_what_is_not_read_is_not_summed(checkpoint: Path) -> None:
    alter(checkpoint / "moments-rank-00000.safetensors")
    load_model(checkpoint)


def rewrite(checkpoint: Path, **changes: Any) -> None:
    manifests.write(checkpoint, replace(manifests.read(checkpoint), **changes))


def test_a_model_of_another_version_is_refused(checkpoint: Path) -> None:
    config = manifests.read(checkpoint).config
    rewrite(checkpoint, config=config | {"model": config["model"] | {"experts": 8}})
    with pytest.raises(MegalmError, match=r"a model this version of megalm does not know: model.experts: .* 0\.1\.0"):
        load_model(checkpoint)
    rewrite(checkpoint, config=config | {"model": config["model"] | {"num_layers": 3}})
    with pytest.raises(MegalmError, match=r"other weights than its config describes, first blocks.2.attention"):
        load_model(checkpoint)
    rewrite(checkpoint, config=config | {"model": config["model"] | {"intermediate_size": 96}})
    with pytest.raises(MegalmError, match=r"blocks.0.feed_forward.down.weight \(\[48, 80\] instead of \[48, 96\]\)"):
        load_model(checkpoint)


def test_a_tokenizer_that_is_elsewhere_is_named(checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    config = manifests.read(checkpoint).config
    rewrite(checkpoint, config=config | {"data": {"tokenizer": "runs/gone/tokenizer"}})
    with pytest.raises(MegalmError, match=r"tokenizer of checkpoint .*step-20 is not at runs/gone/tokenizer: work in"):
        load_model(checkpoint)
    moved = shutil.copytree(tokenizer_path, tmp_path / "moved")
    assert load_model(checkpoint, tokenizer=moved)[2].vocab_size == 257


def test_another_tokenizer_is_refused(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path, make_tokenizer: Callable[..., Path]
) -> None:
    larger = make_tokenizer(tmp_path / "larger", ("<|endoftext|>", "<|im_end|>"))
    smaller = make_tokenizer(tmp_path / "same size", ("</s>",))
    with pytest.raises(MegalmError, match=r"larger has 258 ids and the model of checkpoint .* has 257: give the path"):
        load_model(checkpoint, tokenizer=larger)
    config = manifests.read(checkpoint).config
    rewrite(checkpoint, data={"blend": {"tokenizer": tokenizer.fingerprint}})
    load_model(checkpoint)
    with pytest.raises(MegalmError, match=r"same size is not the one .* trained with \(fingerprint \w+, expected"):
        load_model(checkpoint, tokenizer=smaller)
    # without a fingerprint sizes must be equal
    rewrite(checkpoint, config=config | {"model": config["model"] | {"vocab_size": 300}}, data={})
    with pytest.raises(MegalmError, match="has 257 ids and the model of checkpoint .* has 300"):
        load_model(checkpoint)


def test_a_vocabulary_larger_than_its_tokenizer_is_fine(
    tmp_path: Path, make_model: MakeModel, make_checkpoint: MakeCheckpoint, tokenizer_path: Path, tokenizer: Tokenizer
) -> None:
    """Training allows it (presets have their own vocab_size); the fingerprint tells that it is the right one."""
    make_checkpoint(tmp_path, *make_model(vocab_size=300), tokenizer_path, fingerprint=tokenizer.fingerprint)
    assert load_model(tmp_path)[1].vocab_size == 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(checkpoint: Path) -> None:
    with pytest.raises(MegalmError, match="no CUDA device here"):
        load_model(checkpoint, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_text_is_the_same(checkpoint: Path) -> None:
    ours, theirs = load_model(checkpoint)[0], load_model(checkpoint, device="cuda")[0]
    torch.testing.assert_close(next_logits(theirs, [[1, 2, 3]]), next_logits(ours, [[1, 2, 3]]), atol=1e-4, rtol=1e-4)


def test_no_engine_is_imported() -> None:
    """Loading and generating start fast."""
    heavy = {"torch", "deepspeed", "megatron", "transformers"}
    code = f"import sys, megalm.eval.load, megalm.eval.generate; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torch\n"
