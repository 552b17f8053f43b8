"""Wrong folders, missing files, other architectures: one sentence each, and nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalm.checkpoint.tensors import Snapshot, file_name
from megalm.convert import conversion, sources
from megalm.convert.architectures import of_json
from megalm.convert.conversion import from_hf, to_hf
from megalm.convert.folder import parse_size
from megalm.convert.sources import FolderSource
from megalm.errors import MegalmError
from tests.convert import models


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """step-20 and hf, in three files."""
    folder = tmp_path_factory.mktemp("origin")
    step = models.checkpoint(folder, *models.build(), tokenizer_path, tensor=2)
    to_hf(step, folder / "hf", max_shard_size="150KB", verify=False)
    return folder


def refused(call: Callable[[], Any], words: str, parent: Path) -> None:
    before = sorted(parent.iterdir())
    with pytest.raises(MegalmError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert sorted(parent.iterdir()) == before, "something is left behind"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    kept = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in kept.items() if value != "leave out"}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the folder's first file."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


FIRST = "model.embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "is not a Hugging Face folder: it has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("model*")],
        "has neither model.safetensors nor model.safetensors.index.json: save the model as safetensors",
    ),
    "missing file": (
        lambda f: next(f.glob("model-00002*")).unlink(),
        "model-00002-of-0000..safetensors is missing: copy the folder again",
    ),
    "short file": (
        lambda f: (p := next(f.glob("model-00002*"))).write_bytes(p.read_bytes()[:-8]),
        "model-00002-of-0000..safetensors cannot be read",
    ),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(FIRST)), f"has no tensor {FIRST}"),
    "other shape": (
        lambda f: edit(f, intermediate_size=96),
        r"the tensor .*gate_proj.weight is \[80, 48\], and config.json describes \[96, 48\]",
    ),
    "integers": (lambda f: rewrite(f, lambda t: t.update({FIRST: t[FIRST].long()})), "is I64, and only"),
    "not a number": (lambda f: rewrite(f, lambda t: t[FIRST].fill_(float("inf"))), "is not finite"),
    "another type": (lambda f: edit(f, model_type="mamba"), "a model of type mamba, and megalm reads llama, mistral"),
    "another activation": (lambda f: edit(f, hidden_act="gelu"), "it has hidden_act=gelu, and only silu is supported"),
    "a size left out": (lambda f: edit(f, hidden_size="leave out"), "it has no hidden_size"),
    "a size of text": (lambda f: edit(f, hidden_size="48"), "gives megalm's model.hidden_size the value 48"),
    "another scaling": (
        lambda f: edit(f, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "its rotary scaling is dynamic, and only linear, llama3, yarn are supported",
    ),
    "odd scaling": (
        lambda f: edit(f, rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}),
        "its rotary scaling yarn has mscale=0.7",
    ),
    "quantised": (lambda f: edit(f, quantization_config={"bits": 4}), "describes quantised weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
    "a head of its own": (
        lambda f: edit(f, tie_word_embeddings=True),
        "has a head lm_head.weight that is not its embedding: set tie_word_embeddings to false in its config.json",
    ),
    "qwen's norms": (lambda f: edit(f, model_type="qwen3"), "has no tensor model.layers.0.self_attn.q_norm.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders(case: str, origin: Path, tmp_path: Path) -> None:
    shutil.copytree(origin / "hf", tmp_path / "hf")
    change, words = BROKEN[case]
    change(tmp_path / "hf")
    refused(lambda: from_hf(tmp_path / "hf", tmp_path / "out", verify=False), words, tmp_path)


def test_a_tensor_of_another_architecture(tmp_path: Path, tokenizer_path: Path) -> None:
    step = models.checkpoint(tmp_path / "run", *models.build(), tokenizer_path)
    to_hf(step, tmp_path / "hf", verify=False)
    rewrite(tmp_path / "hf", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}))
    words = "has a tensor model.layers.0.self_attn.q_proj.bias, which no LlamaForCausalLM has"
    refused(lambda: from_hf(tmp_path / "hf", tmp_path / "out", verify=False), words, tmp_path)
    # what is computed, or a copy, is no such tensor
    rewrite(tmp_path / "hf", lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    rewrite(tmp_path / "hf", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    from_hf(tmp_path / "hf", tmp_path / "out", verify=False)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("llama-biases-tied", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
    ],
)
def test_what_older_versions_left_in_a_file_passes_the_gate(
    name: str, left: str, tmp_path: Path, tokenizer_path: Path
) -> None:
    step = models.checkpoint(tmp_path / "run", *models.build(**models.MODELS[name][1]), tokenizer_path)
    to_hf(step, tmp_path / "hf", verify=False)
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({left: torch.ones(6)}))
    from_hf(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-biases-tied", "gpt2"])
def test_a_tied_head_in_the_file_is_the_embedding(
    name: str, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, though it is compared by parts."""
    monkeypatch.setattr(sources, "_BLOCK", 100 * 48)
    step = models.checkpoint(tmp_path / "run", *models.build(**models.MODELS[name][1]), tokenizer_path)
    to_hf(step, tmp_path / "hf", verify=False)
    table = "transformer.wte.weight" if name == "gpt2" else FIRST
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))
    with FolderSource(tmp_path / "hf") as source:
        assert source.config.tie_word_embeddings
    for place in (0, -1):
        other = load_file(tmp_path / "hf" / "model.safetensors")[table]
        other[place, place] += 1
        for head in (other, other[:-1].clone(), other.long()):
            rewrite(tmp_path / "hf", lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
            refused(lambda: FolderSource(tmp_path / "hf"), "a head lm_head.weight that is not its embedding", tmp_path)


def test_a_whole_file_goes_before_an_index(origin: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """As in transformers: save_pretrained leaves the index of the shards that were there before."""
    other, config = models.build(init_std=0.1)
    step = models.checkpoint(tmp_path / "run", other, config, tokenizer_path)
    to_hf(step, tmp_path / "hf", verify=False)
    for shard in (origin / "hf").glob("model*"):
        shutil.copy(shard, tmp_path / "hf")

    def is_the_whole_file() -> bool:
        name = "blocks.1.attention.query.weight"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        with FolderSource(tmp_path / "hf") as source:
            ours = source.whole(name)
        assert torch.equal(theirs.model.layers[1].self_attn.q_proj.weight, other.named_weights()[name])
        return torch.equal(ours, other.named_weights()[name])

    assert is_the_whole_file()
    for shard in (tmp_path / "hf").glob("model-*"):
        shard.unlink()
    assert is_the_whole_file()


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "alibi": ({"position": "alibi"}, "no place for model.position=alibi"),
    "geglu": ({"activation": "geglu"}, "no place for model.activation=geglu"),
    "gpt2 with groups": (models.MODELS["gpt2"][1] | {"num_key_value_heads": 2}, "model.num_key_value_heads=2"),
    "half of the biases": ({"attention_output_bias": True}, "llama, has no place for model.attention_bias=False"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_no_architecture_computes(case: str, tmp_path: Path, tokenizer_path: Path) -> None:
    changes, words = MODELS[case]
    step = models.checkpoint(tmp_path / "run", *models.build(**changes), tokenizer_path)
    refused(lambda: to_hf(step, tmp_path / "hf"), words, tmp_path)


def test_checkpoints(origin: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    step, out = tmp_path / "step-20", tmp_path / "hf"
    refused(lambda: to_hf(tmp_path / "none", out), "does not exist: name a run folder", tmp_path)
    refused(lambda: to_hf(origin / "hf", out), "holds no whole checkpoint", tmp_path)
    shutil.copytree(origin / "step-20", step)
    refused(lambda: to_hf(step, step, verify=False), "exists: name another output folder", tmp_path)
    refused(lambda: to_hf(step, out, tokenizer=tmp_path / "none"), "is not at .*none: work in the folder", tmp_path)
    refused(lambda: to_hf(step, out, max_shard_size="5 apples"), "5 apples is not a size: write it as 5GB", tmp_path)
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_path, other)
    manifest = json.loads((other / "megalm_tokenizer.json").read_text())
    data = bytearray((step / "weights-rank-00001.safetensors").read_bytes())
    data[-5] ^= 1
    (step / "weights-rank-00001.safetensors").write_bytes(data)
    refused(lambda: to_hf(step, out), "weights-rank-00001.safetensors was altered", tmp_path)
    (step / "weights-rank-00001.safetensors").unlink()
    refused(lambda: to_hf(step, out), "weights-rank-00001.safetensors is missing", tmp_path)
    assert manifest["vocab_size"] == 600


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 kb", "2GiB", "77")] == [5 * 10**9, 1500, 2**31, 77]


def test_a_full_disk(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_shard", full)
    with pytest.raises(MegalmError, match=r"could not be written \(No space left on device\): make room"):
        to_hf(origin / "step-20", tmp_path / "hf", verify=False)
    assert not (tmp_path / "hf").exists()


def test_an_interrupted_conversion_goes_on(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = conversion.write_shard, []

    def counted(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    def convert(**options: Any) -> None:
        to_hf(origin / "step-20", tmp_path / "hf", max_shard_size="150KB", verify=False, **options)

    monkeypatch.setattr(conversion, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        convert()
    assert not (tmp_path / "hf").exists() and len(written) == 2
    again: list[str] = []
    monkeypatch.setattr(conversion, "write_shard", lambda path, *rest: (again.append(path.name), write(path, *rest)))
    convert()
    everything = sorted(path.name for path in (origin / "hf").glob("*.safetensors"))
    assert sorted(written + again) == everything and len(again) == len(everything) - 2
    names = sorted(path.name for path in (origin / "hf").iterdir())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (origin / "hf" / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    # other options are another conversion, which starts anew
    shutil.rmtree(tmp_path / "hf")
    written.clear()
    monkeypatch.setattr(conversion, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        convert()
    again.clear()
    monkeypatch.setattr(conversion, "write_shard", lambda path, *rest: (again.append(path.name), write(path, *rest)))
    convert(dtype="bf16")
    assert len(again) > 1 and again[0].startswith("model-00001")
    assert {t.dtype for t in load_file(sorted((tmp_path / "hf").glob("*.safetensors"))[0]).values()} == {torch.bfloat16}


def test_an_interrupted_import_goes_on(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Snapshot.write, list[int]()
    stop_after = 3

    def counted(self: Snapshot, folder: Path, rank: int) -> Any:
        if len(written) == stop_after:
            (folder / file_name(rank)).write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(rank)
        return write(self, folder, rank)

    def convert() -> list[int]:
        """The files that are written."""
        written.clear()
        from_hf(tmp_path / "hf", tmp_path / "back", workers=1)
        return written

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    monkeypatch.setattr(Snapshot, "write", counted)
    shutil.copytree(origin / "hf", tmp_path / "hf")
    with pytest.raises(KeyboardInterrupt):
        convert()
    assert not (tmp_path / "back").exists() and written == [0, 1, 2]
    stop_after = -1
    rest = list(convert())
    whole = files(tmp_path / "back")
    assert rest == list(range(3, 3 + len(rest))) and len(rest) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf"]
    shutil.rmtree(tmp_path / "back")
    assert convert() == [0, 1, 2, *rest] and files(tmp_path / "back") == whole, "as if it had never been interrupted"
    assert not [name for name in whole if name.endswith((".part", ".json")) and name.startswith("weights")]

    # a folder that has changed is another conversion, which starts anew
    shutil.rmtree(tmp_path / "back")
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        convert()
    rewrite(tmp_path / "hf", lambda tensors: tensors[FIRST].mul_(2))
    stop_after = -1
    assert convert() == [0, 1, 2, *rest]
    changed = files(tmp_path / "back")
    assert changed.keys() == whole.keys() and changed[file_name(0)] != whole[file_name(0)]


def test_config_keys_of_every_age() -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 128}

    def read(**keys: Any) -> Any:
        return of_json(sizes | keys, "config.json")[1]

    old = read(model_type="llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    new = read(model_type="llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500000})
    assert old == new and old.rope_theta == 5e5 and old.rope_scaling is not None and old.norm_eps == 1e-6
    assert read(model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0
    assert read(model_type="mistral", num_key_value_heads=2).sliding_window == 4096
    assert read(model_type="qwen2", use_sliding_window=False, sliding_window=32).sliding_window is None
    assert read(model_type="qwen3").head_width == 128
    neox = read(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=9)
    assert (neox.rotary_fraction, neox.rope_theta, neox.parallel_residual) == (0.5, 9.0, True)
    assert read(model_type="gpt_neox").rotary_fraction == 0.25
    window = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}
    assert read(**window, max_window_layers=0).sliding_window == 32
    assert read(**window, max_window_layers=2).sliding_window is None
    with pytest.raises(MegalmError, match="only some of its layers have a sliding window"):
        read(**window, max_window_layers=1)
