"""A checkpoint with adapters: merged into an export, or written for peft; both compute what it computes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.convert.adapter import to_peft
from megalm.convert.architectures import HEAD_CLASSES
from megalm.convert.conversion import to_hf
from megalm.convert.sources import CheckpointSource
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig, TuningConfig
from megalm.models.decoder import build_model
from megalm.models.tuning import tuned_decoder
from megalm.nn.config import HeadKind
from megalm.nn.layers import Layers
from tests.checkpoint import writing
from tests.convert import models
from tools import convert_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PLAIN = ["llama", "llama-biases-tied", "mistral", "qwen2", "qwen3"]
TOLERANCE = 1e-5


def cut(name: str) -> int | None:
    """Where tensor parallelism cuts what a tuned model has."""
    module, _, kind = name.rpartition(".")
    row = "attention.output" in module or "feed_forward.down" in module
    if kind == "lora_A":
        return 1 if row else None
    if kind in ("lora_B", "lora_magnitude"):
        return None if row else 0
    return models.cut(name)


def checkpoint(
    directory: Path,
    name: str,
    tokenizer: Path,
    tensor: int = 1,
    head: HeadKind = "language_model",
    **tuning: Any,
) -> Path:
    """Of a model whose adapters have learnt something."""
    labels = {} if head == "language_model" else {"num_labels": 2}
    config = ModelConfig(**models.SIZES | models.MODELS[name][1] | labels, head=head)
    tuned = TuningConfig(**tuning)
    model = build_model(tuned_decoder(config, tuned, Layers(), seed=0, segmented=False), seed=3)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    whole = writing.with_moments({name: parameter.detach() for name, parameter in model.named_weights().items()})
    return writing.save(
        directory,
        writing.ranks(whole, cut, lambda name: 0, tensor=tensor),
        {"pipeline": 1, "data": 1, "tensor": tensor},
        dtype="float32",
        step=20,
        config={"model": config.model_dump(), "tuning": tuned.model_dump(), "data": {"tokenizer": str(tokenizer)}},
        data={},
        versions={"megalm": "0.1.0"},
    )[0]


def tokens() -> torch.Tensor:
    return torch.randint(0, 600, (2, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def our_logits(step: Path) -> torch.Tensor:
    with CheckpointSource(step) as source:  # eval's load_model takes no task's head
        config = source.config
        model = build_model(tuned_decoder(config, source.tuning, Layers(), seed=0, segmented=False), seed=3).eval()
        for name, parameter in model.named_weights().items():
            parameter.copy_(source.saved(name, 0, parameter.shape[0]))
    ids = tokens()
    positions = torch.arange(ids.shape[1]).repeat(ids.shape[0], 1)
    out = model((ids, torch.zeros_like(ids), positions, torch.arange(ids.shape[0])))
    return out.view(*ids.shape, -1)[..., : config.vocab_size]


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=tokens(), use_cache=False).logits


def hugging_face(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / max(1.0, ours.abs().max())).item()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", [*PLAIN, "gpt2", "gpt-neox"])
def test_merged(name: str, method: str, tmp_path: Path, tokenizer_path: Path) -> None:
    step = checkpoint(tmp_path / "run", name, tokenizer_path, tensor=2, method=method)
    to_hf(step, tmp_path / "hf", verify=False)
    assert distance(our_logits(step), their_logits(hugging_face(tmp_path / "hf"))) < TOLERANCE


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", PLAIN)
def test_peft_loads_it_onto_the_base(
    name: str, method: str, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = checkpoint(tmp_path / "run", name, tokenizer_path, method=method)
    base = without_adapters(tmp_path, step, name, tokenizer_path)
    to_hf(base, tmp_path / "base", verify=False)
    monkeypatch.setattr(
        sys, "argv", ["convert_checkpoint.py", "to-hf", str(step), str(tmp_path / "adapter"), "--adapter"]
    )
    convert_checkpoint.main()
    plain = hugging_face(tmp_path / "base")
    unadapted = their_logits(plain)
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    ours, theirs = our_logits(step), their_logits(model)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(ours, unadapted) > 100 * TOLERANCE, "the adapters matter"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("head", HEAD_CLASSES)
def test_a_head_goes_with_the_adapters(head: HeadKind, name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    """Onto a base whose own head is another, and by the class that peft has for the task."""
    step = checkpoint(tmp_path / "run", name, tokenizer_path, head=head, method="lora")
    base = without_adapters(tmp_path, step, name, tokenizer_path)
    to_hf(base, tmp_path / "base", verify=False)
    to_peft(step, tmp_path / "adapter")
    language_model = hugging_face(tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base", num_labels=2)
    plain = getattr(transformers, f"{name.capitalize()}{HEAD_CLASSES[head]}")(config)
    # from_pretrained would not find them: the class for questions calls its body by another name.
    plain.base_model.load_state_dict(language_model.base_model.state_dict())
    model = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ours, ids = our_logits(step), tokens()
    with torch.no_grad():
        said = model(input_ids=ids)
    if head == "question_answering":
        assert distance(ours, torch.stack((said.start_logits, said.end_logits), dim=-1)) < TOLERANCE
    elif head == "token_classification":
        assert distance(ours, said.logits) < TOLERANCE
    else:
        assert distance(ours[:, -1], said.logits) < TOLERANCE, "no padding: read at the last token"


def without_adapters(folder: Path, step: Path, name: str, tokenizer: Path) -> Path:
    """A checkpoint of the weights that the adapters of another were trained beside."""
    with CheckpointSource(step) as source:
        weights = {each: source.saved(each, 0, shape[0]) for each, shape in source.shapes.items()}
    model, config = models.build(**models.MODELS[name][1])
    with torch.no_grad():
        for each, parameter in model.named_weights().items():
            if each in weights:  # a language model's own head is not, where there is another
                parameter.copy_(weights[each])
    return models.checkpoint(folder / "base-run", model, config, tokenizer)


def test_what_peft_cannot_hold_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    def refused(name: str, sentence: str, **tuning: Any) -> None:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        step = checkpoint(folder, name, tokenizer_path, **tuning)
        with pytest.raises(MegalmError, match=sentence):
            to_peft(step, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("llama", "has no adapters")
    refused("gpt2", "gpt2 keeps blocks.0.attention.query in another form", method="lora")
    refused("gpt-neox", "leave out --adapter", method="lora")
    refused(
        "llama",
        r"also trained blocks.0.attention_norm.weight \(tuning.also_train\)",
        method="lora",
        also_train=["*norm*"],
    )


def test_an_altered_checkpoint_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    step = checkpoint(tmp_path / "run", "llama", tokenizer_path, method="lora")
    [weights] = step.glob("weights-*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(MegalmError, match=f"{weights.name} was altered"):
        to_peft(step, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has its name when all of it stands, and the same command makes up for what is missing."""
    step = checkpoint(tmp_path / "run", "llama", tokenizer_path, method="lora")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(MegalmError, match=r"could not be written \(No space left on device\): make room"):
            to_peft(step, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    to_peft(step, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "run"]
    written = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert written == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "file").touch()
    with pytest.raises(MegalmError, match="could not be written"):
        to_peft(step, tmp_path / "file" / "adapter")


@pytest.mark.parametrize(
    "option", [["--dtype", "bf16"], ["--max-shard-size", "5 apples"], ["--tokenizer", "none"], ["--no-verify"]]
)
def test_options_that_adapters_have_no_use_for_are_refused(
    option: list[str], tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = checkpoint(tmp_path / "run", "llama", tokenizer_path, method="lora")
    command = ["convert_checkpoint.py", "to-hf", str(step), str(tmp_path / "adapter"), "--adapter", *option]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(MegalmError, match=f"in fp32 and one file: leave out {option[0]}$"):
        convert_checkpoint.main()
    assert not (tmp_path / "adapter").exists()


def test_its_description(tmp_path: Path, tokenizer_path: Path) -> None:
    step = checkpoint(tmp_path / "run", "llama", tokenizer_path, method="dora", rank=4, targets=["blocks.1.*.query"])
    to_peft(step, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["use_dora"]) == (4, 16.0, True)
    assert described["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(MegalmError, match="exists: name another"):
        to_peft(step, tmp_path / "adapter")
