"""The files in configs/ load, and the models in configs/model/ are the ones whose names they bear."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megalm.config import Config, load
from megalm.errors import MegalmError
from megalm.models.config import ModelConfig
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


def test_rotary_bases_and_scalings() -> None:
    """What the count does not see and a wrong value of which trains all the same."""
    scalings = {name: preset(name).rope_scaling for name in PUBLISHED if name.startswith("llama")}
    kinds = {name: (scaling.kind, scaling.factor) for name, scaling in scalings.items() if scaling}
    assert kinds == {"llama-1b": ("llama3", 32.0)} | {
        f"llama-{size}": ("llama3", 8.0) for size in ("8b", "70b", "405b")
    }
    assert {preset(name).rope_theta for name in scalings} == {500_000.0}
    assert {(preset(name).rope_theta, preset(name).norm_eps) for name in ("qwen3-0.6b", "qwen3-8b")} == {(1e6, 1e-6)}
    assert preset("gpt2-124m").position == "learned"


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
    assert set(CONFIGS.rglob("*.yaml")) == {*MODELS, *RUNS}
    assert {"tiny", "demo", "pretrain_124m", "pretrain_1b", "pretrain_8b", "pretrain_70b"} == {run.stem for run in RUNS}


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
