"""Every architecture, from checkpoints of several layouts: the same logits in transformers, the same bytes back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from megalm.checkpoint import manifest as manifests
from megalm.checkpoint.tensors import read_weights
from megalm.convert.conversion import from_hf, to_hf
from megalm.convert.gate import logits
from megalm.eval.load import load_model
from tests.convert import models

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]
TOLERANCE = 1e-5


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights(folder, manifests.read(folder)))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        one.dtype == second[name].dtype and torch.equal(one, second[name]) for name, one in first.items()
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A folder per model, NAME/hf, and its checkpoint of one process, NAME/step-20."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (_, changes) in models.MODELS.items():
        checkpoint = models.checkpoint(folder / name, *models.build(**changes), tokenizer_path)
        to_hf(checkpoint, folder / name / "hf", verify=False)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(0, 600, (2, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", models.MODELS)
def test_every_layout_exports_the_same_and_comes_back(
    name: str, exported: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    kind, changes = models.MODELS[name]
    model, config = models.build(**changes)
    expected = files(exported / name / "hf")
    for pipeline, tensor in LAYOUTS[1:]:
        layout = tmp_path / f"{pipeline}-{tensor}"
        checkpoint = models.checkpoint(
            layout, model, config, tokenizer_path, pipeline=pipeline, data=3 - pipeline, tensor=tensor
        )
        done = to_hf(checkpoint, layout / "hf", verify=False)
        assert done.architecture.model_type == kind
        assert files(layout / "hf") == expected

    from_hf(exported / name / "hf", tmp_path / "back", verify=False)
    assert same(weights(tmp_path / "back"), weights(exported / name / "step-20"))
    to_hf(tmp_path / "back", tmp_path / "again", verify=False)
    assert files(tmp_path / "again") == expected
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / file).read_bytes() == (exported / name / "hf" / file).read_bytes(), file


@pytest.mark.parametrize("name", models.MODELS)
def test_logits(name: str, exported: Path, tmp_path: Path) -> None:
    """Of the model itself, of transformers', of megalm's that came back, and of the gate's layer-by-layer pass."""
    model, config = models.build(**models.MODELS[name][1])
    ids = tokens()
    positions = torch.arange(64).repeat(2, 1)
    stream = (ids, torch.zeros_like(ids), positions, torch.arange(2))
    with torch.no_grad():
        expected = model(stream).view(2, 64, -1)[..., :600]
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
            exported / name / "hf", dtype=torch.float32, output_loading_info=True
        )
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        from_hf(exported / name / "hf", tmp_path / "back", verify=False)
        back = load_model(tmp_path / "back")[0]
        computed = {
            "transformers": theirs.eval()(input_ids=ids).logits,
            "back": back(stream).view(2, 64, -1)[..., :600],
            "gate": logits(config, lambda weight: model.named_weights()[weight], ids),
        }
    for what, values in computed.items():
        assert (values - expected).abs().max() < TOLERANCE, what
    assert expected.std() > 0.3, "logits that are all alike show nothing"


SCRIPT = """
import sys, torch, transformers, pathlib
print(transformers.__version__)
transformers.utils.logging.disable_progress_bar()
ids = torch.randint(0, 600, (2, 64), generator=torch.Generator().manual_seed(1))
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, output_loading_info=True)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "hf")
    assert not any(found[kind] for kind in kinds), (folder.name, found)
    assert len(tokenizer.encode("naïve 语言")) > 3
    expected = torch.load(folder / "logits.pt")
    with torch.no_grad():
        difference = (model.eval()(input_ids=ids).logits - expected).abs().max().item()
    assert difference < 1e-5, (folder.name, difference)
"""


# Folders that `pip install --target` filled with other versions of transformers; "" is the one that is installed.
VERSIONS = ["", *filter(None, os.environ.get("MEGALM_OTHER_TRANSFORMERS", "").split(os.pathsep))]


@pytest.mark.parametrize("version", VERSIONS)
def test_folders_load_without_a_word(version: str, exported: Path) -> None:
    """In this version of transformers, and in 4.57 where MEGALM_OTHER_TRANSFORMERS names a folder with it."""
    for name, (_, changes) in models.MODELS.items():
        model, config = models.build(**changes)
        weight = model.named_weights()
        torch.save(logits(config, lambda name, weight=weight: weight[name], tokens()), exported / name / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, exported],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": version},
    )
    # torchao, which transformers imports where it finds it, speaks of what it has for other torches and GPUs.
    words = [line for line in done.stderr.splitlines() if "torchao" not in line and "_pytree" not in line]
    assert (done.returncode, words) == (0, []), done.stderr
    if version:
        assert done.stdout.strip() != transformers.__version__


@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtypes(option: str, dtype: torch.dtype, exported: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    step = exported / "qwen2" / "step-20"
    done = to_hf(step, tmp_path / "hf", dtype=option)  # through the gate, with rounded weights on both sides
    assert done.verdict is not None and done.verdict.difference < 2 * TOLERANCE
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in loaded.values()} == {dtype}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").dtype == dtype

    from_hf(tmp_path / "hf", tmp_path / "back")
    expected = {name: tensor.to(dtype) for name, tensor in weights(step).items()}
    assert same(weights(tmp_path / "back"), expected)
    to_hf(tmp_path / "back", tmp_path / "again", verify=False)  # by default as it was
    assert files(tmp_path / "again") == files(tmp_path / "hf")


def test_a_run_in_bf16_exports_bf16_by_default_and_its_masters_on_request(tmp_path: Path, tokenizer_path: Path) -> None:
    model, config = models.build()
    step = models.checkpoint(tmp_path, model, config, tokenizer_path, dtype="bfloat16", tensor=2)
    to_hf(tmp_path / "step-20", tmp_path / "hf", verify=False)
    to_hf(step, tmp_path / "masters", dtype="fp32", verify=False)
    query = model.named_weights()["blocks.1.attention.query.weight"].detach()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")[name], query.bfloat16())
    assert torch.equal(load_file(tmp_path / "masters" / "model.safetensors")[name], query)


def test_shards_are_of_the_size_that_is_asked_for(exported: Path, tmp_path: Path) -> None:
    to_hf(exported / "llama" / "step-20", tmp_path / "hf", max_shard_size="120KB")
    parts = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(parts) > 2 and parts[-1].name == f"model-{len(parts):05d}-of-{len(parts):05d}.safetensors"
    whole = load_file(exported / "llama" / "hf" / "model.safetensors")
    together = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    assert same(together, whole)
    with safe_open(parts[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    from_hf(tmp_path / "hf", tmp_path / "back", verify=False)
    assert same(weights(tmp_path / "back"), weights(exported / "llama" / "step-20"))


def test_what_transformers_saves_is_read(exported: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """Its config.json (rope_parameters), its order of tensors, and base models' names without a prefix."""
    for name in ("llama-llama3", "gpt2", "gpt-neox", "qwen2-window-tied"):
        model = transformers.AutoModelForCausalLM.from_pretrained(exported / name / "hf")
        model.save_pretrained(tmp_path / name)
        from_hf(tmp_path / name, tmp_path / f"{name}-back", tokenizer=tokenizer_path)
        assert same(weights(tmp_path / f"{name}-back"), weights(exported / name / "step-20"))
    transformers.GPT2Model.from_pretrained(exported / "gpt2" / "hf").save_pretrained(tmp_path / "base")
    assert "wte.weight" in load_file(tmp_path / "base" / "model.safetensors")
    from_hf(tmp_path / "base", tmp_path / "base-back", tokenizer=tokenizer_path)
    assert same(weights(tmp_path / "base-back"), weights(exported / "gpt2" / "step-20"))
