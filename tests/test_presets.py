"""The files in configs/ load, and the models in configs/model/ are the ones whose names they bear."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
import yaml

from megalm.config import Config, load
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
from megalm.sft.config import TaskKind
from megalm.training.config import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
RUNS = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "run").glob("*.yaml")])

PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}

LLAMA = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "activation": "swiglu",
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "position": "rotary",
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "qk_norm": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
LLAMA_ROPE = {
    "kind": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
QWEN3 = LLAMA | {
    "vocab_size": 151_936,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "qk_norm": True,
}
# From the config.json that was published with the weights of each, in our words and without our files.
VALUES: dict[str, dict[str, object]] = {
    "gpt2-124m": {
        "vocab_size": 50_257,
        "hidden_size": 768,
        "num_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "intermediate_size": 3072,
        "activation": "gelu_tanh",
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "position": "learned",
        "max_position_embeddings": 1024,
        "rope_scaling": None,
        "qk_norm": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama-1b": LLAMA
    | {"hidden_size": 2048, "num_layers": 16, "num_attention_heads": 32, "head_dim": 64, "intermediate_size": 8192}
    | {"rope_scaling": LLAMA_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    "llama-8b": LLAMA
    | {"hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32, "head_dim": 128, "intermediate_size": 14_336}
    | {"rope_scaling": LLAMA_ROPE},
    "llama-70b": LLAMA
    | {"hidden_size": 8192, "num_layers": 80, "num_attention_heads": 64, "head_dim": 128, "intermediate_size": 28_672}
    | {"rope_scaling": LLAMA_ROPE},
    "llama-405b": LLAMA
    | {"hidden_size": 16_384, "num_layers": 126, "num_attention_heads": 128, "head_dim": 128}
    | {"intermediate_size": 53_248, "rope_scaling": LLAMA_ROPE},
    "qwen3-0.6b": QWEN3
    | {"hidden_size": 1024, "num_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072}
    | {"tie_word_embeddings": True},
    "qwen3-8b": QWEN3 | {"hidden_size": 4096, "num_layers": 36, "num_attention_heads": 32, "intermediate_size": 12_288},
}


class Preset(Config):
    """A file that holds a model and nothing else."""

    model: ModelConfig
    """The model."""


def preset(name: str, *overrides: str) -> ModelConfig:
    return load(str(CONFIGS / "model" / f"{name}.yaml"), Preset, overrides).model


def hugging_face(model: ModelConfig) -> transformers.PreTrainedConfig:
    """The same architecture in transformers' words."""
    if model.norm == "layernorm":
        return transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_position_embeddings,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_attention_heads,
            n_inner=model.intermediate_size,
            tie_word_embeddings=model.tie_word_embeddings,
        )
    config = transformers.Qwen3Config if model.qk_norm else transformers.LlamaConfig
    return config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.feed_forward_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.key_value_heads,
        head_dim=model.head_width,
        attention_bias=model.attention_bias,
        mlp_bias=model.mlp_bias,
        tie_word_embeddings=model.tie_word_embeddings,
    )


def count(config: transformers.PreTrainedConfig) -> int:
    """Weights of transformers' model, built without memory; a tied head counts once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_presets_hold_a_model_alone(path: Path) -> None:
    assert set(yaml.safe_load(path.read_text())) == {"model"}
    load(str(path), Preset)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    model = preset(name)
    assert model.num_parameters() == PUBLISHED[name]
    assert count(hugging_face(model)) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,} weights" in (CONFIGS / "model" / f"{name}.yaml").read_text()


def deviations(name: str, model: ModelConfig) -> set[str]:
    """Keys whose values are not the published ones."""
    actual = model.model_dump() | {
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "intermediate_size": model.feed_forward_width,
    }
    found = {key for key, value in VALUES[name].items() if key != "rope_scaling" and actual[key] != value}
    expected = VALUES[name]["rope_scaling"]
    scaling = None if model.rope_scaling is None else model.rope_scaling.model_dump(include=set(LLAMA_ROPE))
    return found | ({"rope_scaling"} if scaling != expected else set())


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name: str) -> None:
    assert not deviations(name, preset(name))
    # What the table leaves out, the published models do without.
    assert (preset(name).sliding_window, preset(name).hidden_dropout, preset(name).attention_dropout) == (
        None,
        0.0,
        0.0,
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-8b", "model.num_attention_heads=64"),
        ("llama-8b", "model.norm_eps=1e-6"),
        ("llama-8b", "model.rope_scaling.low_freq_factor=2.0"),
        ("llama-1b", "model.rope_scaling.factor=8.0"),
        ("qwen3-8b", "model.rope_theta=500000.0"),
        ("gpt2-124m", "model.activation=gelu"),
    ],
)
def test_a_wrong_value_is_found(name: str, change: str) -> None:
    """Negative control: most of these leave the number of weights as it is."""
    assert deviations(name, preset(name, change)) == {change.split("=")[0].split(".")[1]}


def test_every_preset_is_counted() -> None:
    assert {path.stem for path in MODELS} == {*PUBLISHED, "1m", "10m"}
    assert 0.9e6 < preset("1m", "model.vocab_size=4096").num_parameters() < 1.3e6
    assert 9e6 < preset("10m", "model.vocab_size=4096").num_parameters() < 11e6


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 2, "head_dim": 48},
        {"attention_bias": True, "attention_output_bias": True},
        {"mlp_bias": True, "tie_word_embeddings": True},
        {
            "qk_norm": True,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "attention_output_bias": True,
        },
        {"norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "mlp_bias": True}
        | {"attention_bias": True, "attention_output_bias": True, "intermediate_size": 100},
    ],
)
def test_count_follows_every_part_of_the_model(changes: dict[str, object]) -> None:
    model = ModelConfig.model_validate({"vocab_size": 1000, "hidden_size": 64, "num_layers": 3} | changes)
    expected = count(hugging_face(model))
    assert model.num_parameters() == expected
    # Negative control: one value changed alone changes the count.
    for key, value in changes.items():
        plain = ModelConfig.model_fields[key].default
        if value != plain and key not in ("head_dim", "activation"):
            assert model.model_copy(update={key: plain}).num_parameters() != expected, key


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_configs_load_and_their_degrees_divide(path: Path) -> None:
    config = load(str(path), RunConfig)
    model, parallel = config.model, config.parallel
    assert model.num_attention_heads % parallel.tensor == 0
    assert model.key_value_heads % parallel.tensor == 0
    assert model.num_layers % parallel.pipeline == 0
    assert model.feed_forward_width % parallel.tensor == 0
    assert model.pad_vocab_to_multiple_of % parallel.tensor == 0


def test_folders_of_configs_are_all_tested() -> None:
    others = {*CONFIGS.glob("eval/*.yaml"), *CONFIGS.glob("data/*.yaml")}  # tested with what reads them
    assert set(CONFIGS.rglob("*.yaml")) - others == {*MODELS, *RUNS}
    runs = {"tiny", "demo", "pretrain_124m", "pretrain_1b", "pretrain_8b", "pretrain_70b", "sft_chat"}
    runs |= {"demo_classes", "demo_chat", *(f"task_{kind}" for kind in get_args(TaskKind) if kind != "chat")}
    assert runs == {run.stem for run in RUNS}


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_tiny_suits_every_layout_up_to_two_of_each(schedule: str) -> None:
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", f"parallel.pipeline_schedule={schedule}"]
    config = load(str(CONFIGS / "tiny.yaml"), RunConfig, [*overrides, "parallel.sequence_parallel=true"])
    model, train, data = config.model, config.train, 2
    assert model.key_value_heads % 2 == 0
    assert model.num_layers % (2 * config.parallel.pipeline) == 0, "DualPipeV gives each stage two pieces"
    accumulation, left = divmod(train.global_batch_size, train.micro_batch_size * data)
    assert left == 0
    assert accumulation >= 2 * config.parallel.pipeline
    assert train.precision == "fp32"


def test_model_presets_are_strict() -> None:
    with pytest.raises(MegalmError, match=r"unknown key model.num_layerz; did you mean model.num_layers\?"):
        preset("1m", "model.num_layerz=3")
