"""The gate: a conversion stands only if transformers and megalm compute the same logits from its two sides.

Neither side holds its model: megalm's is computed layer by layer, transformers' module by module, each of which has its
weights while it computes and no longer.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalm.convert import architectures
from megalm.convert.folder import Weights
from megalm.errors import MegalmError, reason
from megalm.models.config import ModelConfig
from megalm.models.decoder import Embedding, Head, decoder
from megalm.nn.config import HeadKind
from megalm.nn.layers import Layers
from megalm.tokenizer.base import Tokenizer

TOLERANCE = 1e-5
"""Largest difference of two logits, in fp32; of logits beyond 1, in units of the largest."""
LENGTH = 256
"""Tokens of a sequence that is compared, where the model takes so many."""
TEXT = """\
All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and
should act towards one another in a spirit of brotherhood.
人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
Все люди рождаются свободными и равными в своем достоинстве и правах.
يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.
Tous les êtres humains naissent libres et égaux en dignité et en droits; naïve façade, cœur — 3.14159 ≈ π 🙂👩‍👩‍👧
def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # 0 for none?\t1234567890
"""


@dataclass(frozen=True)
class Verdict:
    """difference: the largest of two logits, in fp32. notes: what a user of the folder should know, a sentence each."""

    difference: float
    notes: list[str]


def judge(config: ModelConfig, weight: Callable[[str], Tensor], tokenizer: Tokenizer, folder: Path) -> Verdict:
    """Compare megalm's model, whose weights `weight` gives by full name, with transformers' of a folder.

    Raises MegalmError if they differ, if a logit is not a number, if transformers finds a tensor missing, unknown or of
    another shape, or if it is not installed; or if its tokenizer, where the folder has one, gives other ids.
    """
    transformers = _transformers()
    tokens = _tokens(config, tokenizer)
    ours = logits(config, weight, tokens)
    with _quiet(transformers):
        theirs = _their_logits(transformers, folder, tokens, config)
        if config.head == "sequence_classification":
            ours = ours[:, -1]
        notes = _compare_tokenizers(transformers, tokenizer, folder)
    for name, computed in (("megalm", ours), ("transformers", theirs)):
        if not computed.isfinite().all():
            raise MegalmError(f"the logits that {name} computes are not finite: the weights are damaged, or overflow")
    difference = (ours - theirs).abs().max().item()
    allowed = TOLERANCE * max(1.0, ours.abs().max().item())
    if difference > allowed:
        raise MegalmError(
            f"megalm and transformers compute different logits, by up to {difference:.2g} (allowed: {allowed:.2g}): "
            "the mapping of this architecture is wrong for this model, please report it"
        )
    return Verdict(difference, notes)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MegalmError(
            "transformers is not installed, which compares the two models: pip install 'megalm[convert]', or convert "
            "with --no-verify"
        ) from None
    return transformers


def _tokens(config: ModelConfig, tokenizer: Tokenizer) -> Tensor:
    """Two sequences [2, seq]: a text, and ids from all over the vocabulary (a text meets few of them)."""
    assert config.vocab_size is not None
    length = min(LENGTH, config.max_position_embeddings)
    window = config.sliding_window
    if window and window < 1024:  # a window is seen to matter only beyond its length
        length = min(max(length, window + 64), config.max_position_embeddings)
    text = tokenizer.encode(TEXT) or [tokenizer.eos_id]
    text = (text * (length // len(text) + 1))[:length]
    return torch.stack((torch.tensor(text), torch.linspace(0, config.vocab_size - 1, length).round().long()))


@torch.no_grad()
def logits(config: ModelConfig, weight: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """tokens [batch, seq] -> [batch, seq, vocab or classes] of a model in fp32, one layer of which is in memory at a
    time."""
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    stream: Any = (tokens, torch.zeros_like(positions), positions, torch.arange(tokens.shape[0]))
    embedding: Embedding | None = None
    for spec in decoder(config, Layers(), seed=0, segmented=False):
        with torch.device("meta"):
            layer = spec.build().eval()
        layer.to_empty(device="cpu")
        for name, parameter in layer.named_parameters():
            parameter.copy_(weight(f"{spec.name}.{name}"))
        if spec.tied_to is not None:
            assert isinstance(layer, Head) and embedding is not None
            layer.tie(embedding)
        elif isinstance(layer, Embedding) and config.tie_word_embeddings:
            embedding = layer
        stream = layer(stream)
    computed = stream.view(*tokens.shape, -1)
    return computed[..., : config.vocab_size] if config.head == "language_model" else computed


@torch.no_grad()
def _their_logits(transformers: Any, folder: Path, tokens: Tensor, config: ModelConfig) -> Tensor:
    """tokens [batch, seq] -> [batch, seq, vocab or classes] of transformers' model of a folder, in fp32; [batch,
    classes] where a class is that of the row."""
    head, ignored = config.head, architectures.of_model(config).ignored
    with Weights(folder) as weights:
        model, kept = _without_weights(transformers, weights, head, ignored)
        for module in model.modules():
            if own := {key: kept[id(parameter)] for key, parameter in module.named_parameters(recurse=False)}:
                _fill_while_it_computes(module, own, weights)
        if head == "question_answering":  # its classes of some architectures take no use_cache
            said = model(input_ids=tokens)
            return torch.stack((said.start_logits, said.end_logits), dim=-1).float()
        if head == "sequence_classification":  # of a row's last token, whatever its id
            model.config.pad_token_id = None  # type: ignore[union-attr]
            return torch.cat([model(input_ids=row, use_cache=False).logits.float() for row in tokens[:, None]])
        return model(input_ids=tokens, use_cache=False).logits.float()


def _without_weights(
    transformers: Any, weights: Weights, head: HeadKind, ignored: str
) -> tuple[nn.Module, dict[int, str]]:
    """transformers' model of a folder, and for each of its parameters, by id, the folder's tensor that belongs there.
    ignored: names of tensors that are no weights, which not every version of transformers passes over.

    transformers loads tensors of the folder's names and shapes that lie on one stretch of memory, each one number
    further on than the one before: so it judges the names and shapes, makes what is computed and not kept (rotary
    frequencies), and where a parameter begins tells which tensor it took for it.

    Raises MegalmError if it does not load them, or finds one missing, unknown or of another shape.
    """
    folder, names = weights.folder, [name for name in weights.names() if not re.search(ignored, name)]
    shapes = [weights.shape(name) for name in names]
    # not a number: a parameter that is used outside its module's forward pass cannot pass unseen
    memory = torch.full((max(map(math.prod, shapes)) + len(names),), math.nan)
    stand_ins = {
        name: memory[place : place + math.prod(shape)].view(shape)
        for place, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        task = "CAUSAL_LM" if head == "language_model" else head.upper()
        kind = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")[type(config)]
        model, found = kind.from_pretrained(
            None, config=config, state_dict=stand_ins, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever transformers raises, it does not load
        raise MegalmError(
            f"transformers {transformers.__version__} cannot load {folder} ({reason(error)}): use another version "
            "of it, or convert with --no-verify"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, found[kind])):
            raise MegalmError(
                f"transformers {transformers.__version__} finds {kind.replace('_', ' ')} in the folder, {len(wrong)}, "
                f"the first {wrong[0]}: the mapping of this architecture is wrong for this model, please report it"
            )
    kept = {}
    for name, parameter in model.named_parameters():
        # a transformers that makes one parameter of several tensors would have to be followed here
        assert parameter.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr(), name
        kept[id(parameter)] = names[parameter.storage_offset()]
    return model.eval(), kept


def _fill_while_it_computes(module: nn.Module, own: dict[str, str], weights: Weights) -> None:
    """Have a module read its own parameters before its forward pass, and let go of them after it.

    own: name of a parameter -> of the folder's tensor.
    """
    stand_ins = {key: getattr(module, key).data for key in own}

    def fill(*_: object) -> None:
        for key, name in own.items():
            getattr(module, key).data = weights.whole(name)

    def empty(*_: object) -> None:
        for key, stand_in in stand_ins.items():
            getattr(module, key).data = stand_in

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(empty)


def _compare_tokenizers(transformers: Any, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Raises MegalmError if transformers gives other ids to the text; notes what its own choice of a class spoils, and
    what it puts around a text that megalm does not."""
    if not (folder / "tokenizer.json").exists():
        return []
    lines = TEXT.splitlines(keepends=True)
    expected = tokenizer.encode_batch(lines)

    def ids(kind: Any, special: bool = False) -> list[list[int]] | str:
        try:
            theirs = kind.from_pretrained(folder, local_files_only=True)
            return [theirs.encode(line, add_special_tokens=special) for line in lines]
        except Exception as error:  # whatever transformers raises, the tokenizer does not load
            return reason(error)

    kind, notes = transformers.AutoTokenizer, []
    plain = ids(transformers.PreTrainedTokenizerFast)
    if plain != expected:
        why = plain if isinstance(plain, str) else "for the gate's text"
        raise MegalmError(
            f"tokenizer.json gives transformers other ids than megalm's tokenizer ({why}): give another --tokenizer"
        )
    if ids(kind) != expected:
        kind = transformers.PreTrainedTokenizerFast
        notes.append(
            f"AutoTokenizer of transformers {transformers.__version__} puts a class of its own in this tokenizer's "
            "place and gives other ids: load it with PreTrainedTokenizerFast.from_pretrained"
        )
    whole = ids(kind, special=True)
    if whole != [[*tokenizer.begins, *row] for row in expected]:
        notes.append(
            "transformers puts other special tokens around a text than megalm, which puts "
            f"{tokenizer.begins or 'none'} before it: encode with add_special_tokens=False, or set add_bos_token in "
            "tokenizer_config.json as the model was trained"
        )
    return notes


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and reports, whose content is checked here, and without what torchao, which
    transformers imports with its models, says of kernels for other torches."""
    log = transformers.utils.logging
    level, bars, others = log.get_verbosity(), log.is_progress_bar_enabled(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(others)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
