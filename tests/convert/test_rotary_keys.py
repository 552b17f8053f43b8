"""config.json's keys of rotary positions mean here what they mean to transformers: the same frequencies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megalm.convert.architectures import of_json
from megalm.errors import MegalmError
from megalm.nn.position import rotary_attention_factor, rotary_frequencies

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LENGTH = "original_max_position_embeddings"
PARAMETERS = {"rope_type": "default", "rope_theta": 5e5}
WHOLE_HEADS = ("llama", "mistral", "qwen2", "qwen3")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 5e5},
    "llama3 without its length": {"rope_scaling": LLAMA3},
    "llama3 with its length": {"rope_scaling": LLAMA3 | {LENGTH: 32}},
    "llama3 with two lengths": {"rope_scaling": LLAMA3 | {LENGTH: 32}, LENGTH: 64},
    "yarn without its length": {"rope_scaling": YARN},
    "yarn with a length beside it": {"rope_scaling": YARN, LENGTH: 16},
    "yarn with two lengths": {"rope_parameters": YARN | {LENGTH: 32, "rope_theta": 5e5}, LENGTH: 64},
    "linear, with lengths that it does not read": {"rope_scaling": {"type": "linear", "factor": 2.0}, LENGTH: 16},
    "parameters": {"rope_parameters": PARAMETERS},
    "a scaling beside parameters": {"rope_scaling": YARN, "rope_parameters": PARAMETERS},
    "a theta beside both": {"rope_scaling": YARN, "rope_parameters": PARAMETERS, "rope_theta": 1e6},
    "no scaling beside parameters": {"rope_scaling": None, "rope_parameters": PARAMETERS | YARN},
    "a fraction": {"partial_rotary_factor": 0.5},
    "a fraction among the parameters": {"rope_parameters": PARAMETERS | {"partial_rotary_factor": 0.5}},
    "a null fraction": {"partial_rotary_factor": None},
}


def compare(config: dict[str, Any], folder: Path, theirs: dict[str, Any] | None = None) -> None:
    """theirs: what transformers is given, where it does not read `config`."""
    (folder / "config.json").write_text(json.dumps(theirs or config))
    ours = of_json(config, "config.json")[1]
    read = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(read)
    [rotary] = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    frequencies = rotary_frequencies(ours.rotary_width, ours.rope_theta, ours.rope_scaling, torch.device("cpu"))
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0.0)
    assert rotary_attention_factor(ours.rope_scaling) == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("kind", [*WHOLE_HEADS, "gpt_neox"])
@pytest.mark.parametrize("case", CASES)
def test_frequencies(case: str, kind: str, tmp_path: Path) -> None:
    compare(SIZES | {"model_type": kind} | CASES[case], tmp_path)


def test_a_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    """Of some keys transformers says that it cannot compute with it."""
    llama, neox = SIZES | {"model_type": "llama"}, SIZES | {"model_type": "gpt_neox"}
    compare(llama | {"rope_theta": None}, tmp_path, llama)
    compare(neox | {"rotary_pct": None, "rotary_emb_base": None}, tmp_path, neox)
    compare(neox | {"rope_parameters": {"partial_rotary_factor": None, "rope_theta": None}}, tmp_path, neox)
    for scaling in (LLAMA3, YARN):
        without = llama | {"rope_scaling": scaling}
        compare(without | {"rope_scaling": scaling | {LENGTH: None}, LENGTH: None}, tmp_path, without)


@pytest.mark.parametrize("kind", WHOLE_HEADS)
def test_a_fraction_that_transformers_cannot_compute_is_refused(kind: str) -> None:
    config = SIZES | {"model_type": kind, "rope_scaling": YARN, "partial_rotary_factor": 0.5}
    with pytest.raises(MegalmError, match="scaling yarn has partial_rotary_factor=0.5, which is not supported"):
        of_json(config, "config.json")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    with pytest.raises(RuntimeError, match="must match"):
        model(input_ids=torch.arange(8)[None])


def test_a_scaling_that_starts_from_no_length_is_refused() -> None:
    config = SIZES | {"model_type": "llama", "rope_scaling": LLAMA3}
    del config["max_position_embeddings"]
    with pytest.raises(MegalmError, match=f"its rotary scaling llama3 has no {LENGTH}"):
        of_json(config, "config.json")
