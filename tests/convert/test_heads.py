"""Heads of classes: transformers' own class computes the same, picks the same classes, and comes back byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megalm.checkpoint import manifest as manifests
from megalm.convert.architectures import HEAD_CLASSES
from megalm.convert.conversion import from_hf, to_hf
from megalm.convert.start import open_start
from megalm.errors import MegalmError
from megalm.models.decoder import LayerList
from megalm.nn.config import HeadKind
from megalm.tokenizer.load import load
from tests.convert import models

FAMILIES = ["llama-biases-tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt-neox"]
LABELS = ["no", "perhaps", "yes"]


def checkpoint(folder: Path, tokenizer: Path, name: str, head: HeadKind, **task: Any) -> tuple[Path, LayerList]:
    labels = ["start", "end"] if head == "question_answering" else LABELS
    model, config = models.build(**models.MODELS[name][1], head=head, num_labels=len(labels))
    return models.checkpoint(folder, model, config, tokenizer, blend={"labels": labels, **task}), model


@pytest.mark.parametrize("head", HEAD_CLASSES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_transformers_own(name: str, head: HeadKind, tmp_path: Path, tokenizer_path: Path) -> None:
    """The gate compares logits; here, what a user of the folder gets."""
    where, model = checkpoint(tmp_path / "ours", tokenizer_path, name, head)
    done = to_hf(where, tmp_path / "hf")
    assert done.verdict is not None and done.verdict.difference < 1e-5
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    kind = getattr(transformers, described["architectures"][0])
    assert described["architectures"][0].endswith(HEAD_CLASSES[head])
    theirs = kind.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    # Rows of two lengths, the shorter one padded: each is read at its own last token.
    ids = torch.randint(5, 500, (2, 20), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([19, 11])
    mask = torch.arange(20) <= ends[:, None]
    ids = ids.masked_fill(~mask, load(tokenizer_path).pad_id)
    positions = torch.arange(20).repeat(2, 1)
    with torch.no_grad():
        said = theirs(input_ids=ids, attention_mask=mask.long())
        logits = model((ids, torch.zeros_like(ids), positions, torch.arange(2))).view(2, 20, -1)
    if head == "question_answering":
        found = torch.stack((said.start_logits, said.end_logits), dim=-1) - logits
        assert (found * mask[..., None]).abs().max() < 1e-5
    elif head == "token_classification":
        assert ((said.logits - logits) * mask[..., None]).abs().max() < 1e-5
        assert theirs.config.id2label == dict(enumerate(LABELS))
    else:
        assert (said.logits - logits[torch.arange(2), ends]).abs().max() < 1e-5
        assert theirs.config.id2label == dict(enumerate(LABELS))

    from_hf(tmp_path / "hf", tmp_path / "back")
    assert manifests.read(tmp_path / "back").config["model"]["head"] == head
    to_hf(tmp_path / "back", tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_a_wrong_head_is_found_at_the_gate(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalm.models.decoder import Classifier

    where, _ = checkpoint(tmp_path / "ours", tokenizer_path, "llama", "token_classification")
    right = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, stream: right(self, stream) * 1.001)
    with pytest.raises(MegalmError, match="different logits"):
        to_hf(where, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_several_labels_are_told_to_transformers(tmp_path: Path, tokenizer_path: Path) -> None:
    problem = "multi_label_classification"
    where, _ = checkpoint(tmp_path / "ours", tokenizer_path, "llama", "sequence_classification", problem_type=problem)
    to_hf(where, tmp_path / "hf", verify=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["problem_type"] == problem


def test_a_head_starts_on_a_language_model_and_not_the_other_way(tmp_path: Path, tokenizer_path: Path) -> None:
    tied = models.MODELS["llama-biases-tied"][1]
    model, language = models.build(**tied)
    base = models.checkpoint(tmp_path / "base", model, language, tokenizer_path)
    classes = language.model_copy(update={"head": "token_classification", "num_labels": 3})
    tokenizer = load(tokenizer_path)
    assert set(open_start(base, classes, tokenizer, ()).shapes) >= {"embedding.table.weight", "norm.norm.weight"}
    where, _ = checkpoint(tmp_path / "ours", tokenizer_path, "llama-biases-tied", "token_classification")
    open_start(where, classes, tokenizer, ())
    for changed, key in ((language, "head"), (classes.model_copy(update={"num_labels": 4}), "num_labels")):
        with pytest.raises(MegalmError, match=f"{key}="):
            open_start(where, changed, tokenizer, ())
