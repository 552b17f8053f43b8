"""A trained model, whole or cut over tensor-parallel ranks and pipeline stages, from what its run left behind."""

from pathlib import Path

import torch

from megalm.checkpoint import folder as checkpoints
from megalm.checkpoint import manifest as manifests
from megalm.checkpoint import tensors
from megalm.checkpoint.manifest import Manifest
from megalm.errors import MegalmError
from megalm.layout import Layout, check_model
from megalm.models.config import ModelConfig, saved_config
from megalm.models.decoder import LayerList, build_model
from megalm.models.stage import Pipe, Stage
from megalm.models.tuning import tuned_decoder
from megalm.nn.init import spec_of
from megalm.nn.layers import Layers
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.chat import read_template, trained_template
from megalm.tokenizer.load import load as load_tokenizer


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    layers: Layers | None = None,
    pipe: Pipe | None = None,
    ranks: checkpoints.Ranks | None = None,
) -> tuple[LayerList, ModelConfig, Tokenizer]:
    """The language model in eval mode, whatever layout wrote it; its config; and the tokenizer it was trained with.

    path: a run folder or RUN/checkpoints (their newest), or a checkpoint folder. dtype: of the weights; by default as
    they were saved. tokenizer: its path, where it has moved since the run. layers: what the model is built of; over
    tensor-parallel ranks (parallel.inference) each reads and holds its slices only. pipe: the pipeline whose stages
    read and hold their layers only, if there is one. ranks: all that load together. The config has backends of this
    device.

    Raises MegalmError if the checkpoint is missing, damaged (sizes of all files, checksums of the weights), not of this
    version or of a model with another head, if the tokenizer is not the model's, if the ranks cannot cut the model, or
    if there is no such device. Every rank calls it.
    """
    layers, ranks = layers or Layers(), ranks or checkpoints.Alone()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise MegalmError(f"there is no CUDA device here for a model on {device}: choose the device cpu")
    folder = checkpoints.resolve(Path(path))
    manifest = checkpoints.verify(folder, ranks, checksums=False)
    mine = manifests.faults(folder, manifest, sorted(tensors.weight_files(manifest))[ranks.rank :: ranks.size])
    checkpoints.refuse_damaged(folder, sorted(fault for part in ranks.gather(mine) for fault in part))
    config, tuning = saved_config(manifest.config, folder, manifest.versions.get("megalm", "unknown"))
    if config.head != "language_model":
        raise MegalmError(
            f"checkpoint {folder} has a head for {config.head.replace('_', ' ')} and writes no text: "
            "tools/report_run.py says how good it is, tools/convert_checkpoint.py to-hf exports it",
            echo=ranks.rank > 0,
        )
    if pipe and config.num_layers < pipe.stages:
        raise MegalmError(
            f"the model of checkpoint {folder} has {config.num_layers} layers and cannot be cut into {pipe.stages} "
            f"pipeline stages: choose a pipeline degree of {config.num_layers} or less",
            echo=ranks.rank > 0,
        )
    check_model(
        Layout(tensor=layers.tensor_size),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        intermediate_size=config.feed_forward_width,
        padded_vocab_size=config.padded_vocab_size(),
        num_layers=config.num_layers,
        stages=1,
    )
    loaded = _tokenizer(tokenizer or manifest.config["data"]["tokenizer"], config, manifest, folder)
    with torch.device("meta"):  # nothing is allocated before device, dtype and this rank's part are known
        whole = build_model(tuned_decoder(config, tuning, layers, seed=0, segmented=False), seed=None)
    cuts = {name: spec_of(parameter).shard_dim for name, parameter in whole.named_weights().items()}
    _refuse_other_weights(whole, folder, manifest, cuts, layers)
    model = Stage(whole, config, pipe) if pipe else whole
    if dtype is None:
        dtype = getattr(torch, next(iter(manifest.parameters.values()))["dtype"])
    model.to(dtype=dtype).to_empty(device=device)
    model.tie()
    _fill(model, folder, manifest, cuts, layers)
    return model.eval().requires_grad_(False), config, loaded


def chat_template(path: str | Path, tokenizer: str | Path | None = None) -> str | None:
    """The chat template that a run or checkpoint was fine-tuned with, else the one beside its tokenizer, if any.

    tokenizer: its path, where it has moved since the run.
    """
    manifest = manifests.read(checkpoints.resolve(Path(path)))
    trained_with = trained_template(manifest.data.get("blend", {}))
    return trained_with or read_template(tokenizer or manifest.config["data"]["tokenizer"])


def _tokenizer(path: str | Path, config: ModelConfig, manifest: Manifest, folder: Path) -> Tokenizer:
    """The tokenizer at `path`, if it is the one the model was trained with."""
    if not Path(path).exists():
        raise MegalmError(
            f"the tokenizer of checkpoint {folder} is not at {path}: work in the folder where the run was started, or "
            "give the tokenizer's path"
        )
    tokenizer = load_tokenizer(path)
    trained_with = manifest.data.get("blend", {}).get("tokenizer")  # its fingerprint, as the loader wrote it down
    if tokenizer.fingerprint == trained_with:
        return tokenizer
    if tokenizer.vocab_size != config.vocab_size:
        raise MegalmError(
            f"the tokenizer at {path} has {tokenizer.vocab_size} ids and the model of checkpoint {folder} has "
            f"{config.vocab_size}: give the path of the tokenizer it was trained with"
        )
    if trained_with is not None:
        raise MegalmError(
            f"the tokenizer at {path} is not the one that checkpoint {folder} was trained with (fingerprint "
            f"{tokenizer.fingerprint[:12]}, expected {trained_with[:12]}): "
            f"{tokenizer.way_to(trained_with, 'give the path of that one')}"
        )
    return tokenizer


def _refuse_other_weights(
    whole: LayerList, folder: Path, manifest: Manifest, cuts: dict[str, int | None], layers: Layers
) -> None:
    """Hold the names and shapes of all weights against the checkpoint's, whichever of them this rank will read."""
    shapes = {name: list(parameter.shape) for name, parameter in whole.named_weights().items()}
    for name, dim in cuts.items():
        if dim is not None:
            shapes[name][dim] *= layers.tensor_size
    theirs = {name: entry["shape"] for name, entry in manifest.parameters.items()}
    if different := sorted(name for name in shapes | theirs if shapes.get(name) != theirs.get(name)):
        raise MegalmError(
            f"checkpoint {folder} holds other weights than its config describes, first {different[0]} "
            f"({theirs.get(different[0])} instead of {shapes.get(different[0])}): use the version of megalm that wrote "
            f"it, {manifest.versions.get('megalm', 'unknown')}"
        )


@torch.no_grad()
def _fill(model: LayerList, folder: Path, manifest: Manifest, cuts: dict[str, int | None], layers: Layers) -> None:
    """Copy a checkpoint's weights, or this rank's slices of them, into the model of its config.

    cuts: name -> dimension along which tensor parallelism cuts a weight.
    """
    with tensors.Reader(folder, manifest) as reader:
        for name, parameter in model.named_weights().items():
            place = (cuts[name], layers.tensor_rank, layers.tensor_size) if cuts[name] is not None else (None, 0, 1)
            # rounded to the precision it was trained in first: the forward pass never saw the fp32 weight
            saved = reader.stretch(name, tensors.WEIGHT, *place, 0, parameter.numel())
            parameter.copy_(saved.view(parameter.shape).to(getattr(torch, manifest.parameters[name]["dtype"])))
