"""A checkpoint's adapters as a folder that peft loads onto the base model."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.convert import architectures
from megalm.convert.conversion import Report, refuse_existing, silent, unfinished, verify_weights
from megalm.convert.folder import Budget, Planned, write_json, write_shard
from megalm.convert.mapping import Same
from megalm.convert.sources import CheckpointSource
from megalm.errors import MegalmError
from megalm.models.tuning import is_added, is_head, is_trained
from megalm.nn.adapter import MAGNITUDE, A, B
from megalm.nn.config import HeadKind

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAMES = {A: "lora_A.weight", B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
"""Our names of an adapter's parameters -> peft's in a file."""
_TASKS: dict[HeadKind, str] = {
    "language_model": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}
"""What peft calls them."""


def to_peft(checkpoint: Path, output: Path, *, workers: int = 4, report: Report = silent) -> int:
    """Write the adapters of a checkpoint, and a task's head beside them, fp32, and peft's description of them; returns
    the bytes of the weights.

    The base is the model that the run started from (model.init_from), as to_hf writes it or as it came.

    Raises MegalmError if the checkpoint is missing or damaged, if there are no adapters, or if peft could not hold what
    was trained; then there is no output.
    """
    refuse_existing(output)
    with CheckpointSource(checkpoint) as source:
        if not source.adapters:
            raise MegalmError(
                f"checkpoint {source.path} has no adapters, its weights were trained: leave out --adapter"
            )
        more = [name for name in source.shapes if is_trained(name, source.tuning) and not is_added(name)]
        if more:
            raise MegalmError(
                f"checkpoint {source.path} also trained {more[0]} (tuning.also_train), which an adapter has no place "
                "for: leave out --adapter, which merges everything"
            )
        architecture = architectures.of_model(source.config)
        entries = architectures.entries(architecture, source.config)
        theirs = {ours: entry for entry in entries for ours in entry.ours}
        names, modules = {}, []
        for name in source.adapters:
            module, _, kind = name.rpartition(".")
            entry = theirs[f"{module}.weight"]
            if type(entry.mapping) is not Same:
                raise MegalmError(
                    f"{architecture.model_type} keeps {module} in another form ({entry.theirs}), which peft would "
                    "adapt otherwise: leave out --adapter, which merges the adapters"
                )
            target = entry.theirs.removesuffix(".weight")
            modules.append(target)
            names[f"base_model.model.{target}.{_NAMES[kind]}"] = name
        heads = [entry for name, entry in theirs.items() if is_head(name)]
        for entry in heads:
            [name] = entry.ours
            names[f"base_model.model.{entry.theirs}"] = name
        saved = sorted({entry.theirs.rpartition(".")[0] for entry in heads})
        shapes = source.shapes | source.adapters
        planned = [Planned(theirs, shapes[ours], "float32") for theirs, ours in names.items()]

        def make(theirs: str) -> Tensor:
            return source.saved(names[theirs], 0, shapes[names[theirs]][0])

        verify_weights(source, workers, report)
        plan = {"checkpoint": source.manifest.files, "adapter": True, "megalm": version("megalm")}
        with unfinished(output, plan) as partial:
            budget = Budget(2 * max(math.prod(tensor.shape) for tensor in planned))
            write_shard(partial / WEIGHTS_FILE, planned, make, budget, workers)
            write_json(partial / CONFIG_FILE, _described(source, sorted(set(modules)), saved))
        return sum(tensor.bytes for tensor in planned)


def _described(source: CheckpointSource, modules: list[str], saved: list[str]) -> dict[str, Any]:
    """saved: modules that were trained whole, a head's."""
    tuning = source.tuning
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[source.config.head],
        "base_model_name_or_path": source.manifest.config["model"].get("init_from"),
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "lora_dropout": 0.0,
        "use_dora": tuning.method == "dora",
        "target_modules": modules,
        **({"modules_to_save": saved} if saved else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
