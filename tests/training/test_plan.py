"""A config at a number of ranks: what is refused, in one sentence with the numbers and a way out that works."""

import copy
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import yaml

from megalm.config import load
from megalm.errors import MegalmError
from megalm.parallel.proved import Proved, proved
from megalm.tokenizer.load import load as load_tokenizer
from megalm.tokenizer.train import train
from megalm.training.config import RunConfig
from megalm.training.plan import plan, stages
from tests.distributed.ranks import run_ranks

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With more micro-batches than other tests have, so that more layouts could run."""
    return lambda name="run", **sections: settings(name, **{"train": {"micro_batch_size": 2}} | sections)


def with_keys(tree: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """`tree` with dotted keys set."""
    changed = copy.deepcopy(tree)
    for key, value in keys.items():
        *above, last = key.split(".")
        branch = changed
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return changed


def refusal(tree: dict[str, Any], ranks: int, folder: Path) -> str:
    """What the command says of a config file on this many ranks: one sentence."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(MegalmError) as caught:
        plan(load(str(path), RunConfig), ranks)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}:")


# keys set over the tiny run (4 heads, 2 key-value heads, 4 layers, batch 16 by 2, sequences of 32, 600 ids), ranks,
# the sentence, and a change that it proposes
REFUSED: dict[str, tuple[dict[str, Any], int, str, dict[str, Any] | int]] = {
    "heads": (
        {"parallel.tensor": 3, "model.intermediate_size": 96, "model.pad_vocab_to_multiple_of": 3},
        3,
        "parallel.tensor 3 does not divide model.num_attention_heads 4: the nearest degree that serves on 3 ranks is 1",
        {"parallel.tensor": 1, "train.global_batch_size": 18},
    ),
    "inner width": (
        {"parallel.tensor": 4, "model.intermediate_size": 90},
        4,
        "parallel.tensor 4 does not divide model.intermediate_size 90: the nearest degree that serves on 4 ranks is 2",
        {"parallel.tensor": 2},
    ),
    "key-value heads": (
        {"parallel.tensor": 4, "model.num_attention_heads": 12, "model.num_key_value_heads": 6, "model.head_dim": 4},
        4,
        "parallel.tensor 4 and model.num_key_value_heads 6 do not divide one another: "
        "the nearest degree that serves on 4 ranks is 2",
        {"parallel.tensor": 2},
    ),
    "vocabulary": (
        {"parallel.tensor": 4, "model.vocab_size": 601, "model.pad_vocab_to_multiple_of": 1},
        4,
        "parallel.tensor 4 does not divide the padded vocabulary of 601 rows: "
        "set model.pad_vocab_to_multiple_of to a multiple of 4, such as 512",
        {"model.pad_vocab_to_multiple_of": 512},
    ),
    "ranks": (
        {"parallel.tensor": 2, "parallel.pipeline": 2},
        6,
        "parallel.tensor 2 x parallel.pipeline 2 = 4 does not divide the 6 ranks: "
        "start 4 or 8 ranks, or choose degrees whose product divides 6",
        8,
    ),
    "batch over ranks": (
        {},
        3,
        "train.global_batch_size 16 is not a multiple of train.micro_batch_size 2 x 3 data-parallel ranks = 6: "
        "the nearest legal one is 18",
        {"train.global_batch_size": 18},
    ),
    "batch": (
        {"train.micro_batch_size": 3},
        1,
        "train.global_batch_size 16 is not a multiple of train.micro_batch_size 3: the nearest legal one is 15",
        {"train.global_batch_size": 15},
    ),
    "layers": (
        {"parallel.pipeline": 8},
        8,
        "model.num_layers 4 cannot be cut into 8 pipeline stages: set parallel.pipeline to 4, or add layers",
        {"parallel.pipeline": 4},
    ),
    "layers of a V": (
        {"parallel.pipeline": 2, "parallel.pipeline_schedule": "dualpipev", "model.num_layers": 3},
        2,
        "model.num_layers 3 cannot be cut into 4 pipeline stages: set parallel.pipeline to 1 and "
        "parallel.pipeline_schedule to 1f1b, or add layers",
        {"parallel.pipeline": 1, "parallel.pipeline_schedule": "1f1b"},
    ),
    "micro-batches of a V": (
        {"parallel.pipeline": 2, "parallel.pipeline_schedule": "dualpipev", "train.global_batch_size": 8},
        4,
        "parallel.pipeline_schedule dualpipev over 2 ranks needs at least 4 micro-batches per step, not 2: "
        "raise train.global_batch_size to 16 or lower train.micro_batch_size",
        {"train.global_batch_size": 16},
    ),
    "ZeRO 2 in a pipeline": (
        {"parallel.pipeline": 2, "parallel.zero": 2},
        2,
        "parallel: zero 2 with pipeline 2 is not supported (each micro-batch would reduce its gradients anew): "
        "set zero to 1, or pipeline to 1",
        {"parallel.zero": 1},
    ),
    "context": (
        {"parallel.context": 2},
        2,
        "parallel: context 2 is not supported yet: set context to 1 and raise tensor instead",
        {"parallel.context": 1, "parallel.tensor": 2},
    ),
    "sequence parallelism of one": (
        {"parallel.sequence_parallel": True},
        1,
        "parallel: sequence_parallel needs tensor > 1: raise tensor or set sequence_parallel to false",
        {"parallel.sequence_parallel": False},
    ),
    "sequence length over ranks": (
        {"parallel.sequence_parallel": True, "parallel.tensor": 4, "train.sequence_length": 30},
        4,
        "train.sequence_length 30 is not a multiple of parallel.tensor 4, which parallel.sequence_parallel needs: "
        "set it to 28, or turn that off",
        {"train.sequence_length": 28},
    ),
    "a V of one": (
        {"parallel.pipeline_schedule": "dualpipev"},
        1,
        "parallel: pipeline_schedule dualpipev needs pipeline > 1: raise pipeline or use 1f1b",
        {"parallel.pipeline_schedule": "1f1b"},
    ),
    "offload without ZeRO": (
        {"parallel.offload_optimizer": True, "parallel.zero": 0},
        1,
        "parallel: offload_optimizer needs zero 1, 2 or 3: raise zero or turn it off",
        {"parallel.zero": 1},
    ),
    "bf16 without ZeRO": (
        {"train.precision": "bf16", "parallel.zero": 0},
        1,
        "parallel.zero 0 with train.precision bf16 would accumulate gradients in bf16: "
        "set parallel.zero to 1, which keeps fp32 ones",
        {"parallel.zero": 1},
    ),
    "fp16 without ZeRO": (
        {"train.precision": "fp16", "parallel.zero": 0},
        1,
        "parallel.zero 0 with train.precision fp16 would accumulate gradients in fp16: "
        "set parallel.zero to 1, which keeps fp32 ones",
        {"parallel.zero": 1},
    ),
    "sequences longer than positions": (
        {"train.sequence_length": 4096},
        1,
        "train.sequence_length 4096 is above model.max_position_embeddings 2048: raise the latter",
        {"model.max_position_embeddings": 4096},
    ),
    "warm-up longer than the run": (
        {"schedule.warmup_steps": 9, "schedule.total_steps": None},
        1,
        "warmup_steps 9 is more than train.steps 8: lower the former or raise the latter",
        {"train.steps": 9},
    ),
    "megalm's own key": (
        {"deepspeed": {"gradient_clipping": 3.0}},
        1,
        "deepspeed.gradient_clipping is decided by megalm: set optimizer.gradient_clipping instead",
        {"deepspeed": {}, "optimizer.gradient_clipping": 3.0},
    ),
    "megalm's own key, nested": (
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        1,
        "deepspeed.zero_optimization.stage is decided by megalm: set parallel.zero instead",
        {"deepspeed": {}, "parallel.zero": 2},
    ),
    "vocabulary below the tokenizer's": (
        {"model.vocab_size": 599},
        1,
        "model.vocab_size 599 is below the 600 ids of TOKENIZER: leave it out to take the tokenizer's",
        {"model.vocab_size": None},
    ),
    "hidden size": (
        {"model.hidden_size": 34},
        1,
        "model: hidden_size 34 is not a multiple of num_attention_heads 4: change one of them or set head_dim",
        {"model.head_dim": 8},
    ),
    "one corpus held out twice": (
        {"data.held_out": [{"path": "one"}, {"path": "one"}]},
        1,
        "data.held_out names one twice: name each corpus once",
        {"data.held_out": []},
    ),
    "no shards": (
        {"data.sources": []},
        1,
        "data.sources is empty: name at least one shard folder",
        {},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_a_way_out_that_works(
    settings: Settings, corpus: Path, tmp_path: Path, name: str
) -> None:
    keys, ranks, sentence, way = REFUSED[name]
    tree = with_keys(settings(), keys)
    message = refusal(tree, ranks, tmp_path).replace(str(corpus / "tokenizer"), "TOKENIZER")
    assert message.endswith(sentence), message
    assert re.fullmatch(r"((\S*run\.yaml:)?\d+(, )?)*:? ?", message.removesuffix(sentence)), "file and line come first"
    if isinstance(way, int):
        ranks, way = way, {}
    proposed = with_keys(tree, way)
    if name == "no shards":
        proposed["data"]["sources"] = settings()["data"]["sources"]
    plan(RunConfig.model_validate(proposed), ranks)


def test_the_run_itself_is_accepted(settings: Settings, corpus: Path) -> None:
    config = RunConfig.model_validate(settings(parallel={"tensor": 2, "pipeline": 2}))
    planned = plan(config, 8)
    assert planned.layout.describe() == "pipeline 2 x data 2 x tensor 2 = 8 ranks"
    assert planned.accumulation == 4
    assert planned.config.model.vocab_size == 600 == load_tokenizer(corpus / "tokenizer").vocab_size
    assert config.model.vocab_size is None, "the config itself is not changed"
    assert stages(config.parallel) == 2
    assert stages(config.parallel.model_copy(update={"pipeline_schedule": "dualpipev"})) == 4


def test_a_padded_vocabulary_may_be_larger_than_the_tokenizer(settings: Settings) -> None:
    planned = plan(RunConfig.model_validate(settings(model={"vocab_size": 1000})), 1)
    assert planned.config.model.padded_vocab_size() == 1024


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "there is no tokenizer at .*nowhere: correct the path, or run tools/train"),
        (lambda folder: folder, "holds no tokenizer: it has neither"),
        (lambda folder: _file(folder / "x.model", b"not a model"), r"x\.model"),
        (lambda folder: _file(folder / "tokenizer.json", b"{}"), r"tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_is_none(settings: Settings, tmp_path: Path, make: Callable[..., Path], message: str) -> None:
    tree = with_keys(settings(), {"data.tokenizer": str(make(tmp_path))})
    assert re.search(message, refusal(tree, 1, tmp_path))


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_missing_tokenizer_key(settings: Settings, tmp_path: Path) -> None:
    tree = settings()
    del tree["data"]["tokenizer"]
    assert refusal(tree, 1, tmp_path).endswith(
        "data.tokenizer is empty: name the tokenizer the shards were written with"
    )


def test_shards_that_are_not_there(settings: Settings, corpus: Path, tmp_path: Path) -> None:
    for key in ("sources", "held_out"):
        tree = with_keys(settings(), {f"data.{key}": [{"path": str(tmp_path / "nowhere")}]})
        assert refusal(tree, 1, tmp_path).startswith(f"there is no shard folder {tmp_path}/nowhere: correct the path")
    tree = with_keys(settings(), {"data.sources": [{"path": str(corpus / "shards")}]})
    assert refusal(tree, 1, tmp_path).endswith(f"is not a shard folder itself: name {corpus}/shards/train")


def test_a_tokenizer_that_the_shards_were_not_written_with(settings: Settings, corpus: Path, tmp_path: Path) -> None:
    train(topics.values, 500).save(tmp_path / "other")
    message = refusal(with_keys(settings(), {"data.tokenizer": str(tmp_path / "other")}), 1, tmp_path)
    assert re.search(r"was written with another tokenizer \(fingerprint \w{12}, 600 ids\) than the one given", message)
    assert "set data.tokenizer to the former" in message


def test_a_truncated_shard(settings: Settings, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "shards" / "train", tmp_path / "shards")
    victim = tmp_path / "shards" / "shard-000000.tar"
    size = victim.stat().st_size
    os.truncate(victim, size - 512)
    message = refusal(with_keys(settings(), {"data.sources": [{"path": str(tmp_path / "shards")}]}), 1, tmp_path)
    assert message.startswith(f"the shard file {victim} is truncated ({size - 512:,} bytes, {size:,} expected): ")


def test_a_run_folder_that_cannot_be_used(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _file(tmp_path / "taken", b"")
    for directory in (taken, taken / "below" / "it"):
        message = refusal(with_keys(settings(), {"run.directory": str(directory)}), 1, tmp_path)
        assert message == (
            f"run.directory {directory} cannot be used, {taken} is not a folder: choose another run.directory"
        )
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind root
    message = refusal(settings("not/made/yet"), 1, tmp_path)
    assert f"cannot be used, {tmp_path} may not be written by you: choose another" in message
    monkeypatch.undo()
    plan(RunConfig.model_validate(settings("not/made/yet")), 1)
    assert not (tmp_path / "not").exists(), "planning changes no file"


def facts_of(tree: dict[str, Any]) -> dict[str, str]:
    """What a run says of a config of which nothing is proved."""
    import torch

    from megalm.training import plan as planning
    from megalm.training.build import _facts

    planning.proved = lambda: Proved(frozenset(), frozenset())  # type: ignore[assignment]
    return _facts(planning.plan(RunConfig.model_validate(tree), 1), torch.device("cpu"), {})


def test_what_is_not_proved_is_refused_or_allowed_and_said(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan(RunConfig.model_validate(settings()), 1).unproved == ""
    monkeypatch.setattr("megalm.training.plan.proved", lambda: Proved(frozenset(), frozenset()))
    what = (
        "parallel.tensor 1, parallel.pipeline 1, data-parallel ranks >1, parallel.zero 1, "
        "parallel.offload_optimizer off, parallel.recompute none, train.precision fp32, micro-batches per step >1 "
        "is not proved to train the model that one process trains"
    )
    assert refusal(settings(), 2, tmp_path) == (
        f"{what}: choose what is (docs/support.md), or set parallel.allow_unproved to true"
    )
    allowed = settings(parallel={"allow_unproved": True})
    assert plan(RunConfig.model_validate(allowed), 2).unproved == what
    [facts] = run_ranks(1, facts_of, allowed)
    assert facts["unproved"].endswith("is not proved to train the model that one process trains")


def test_whatever_auto_may_choose_is_proved(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = settings(parallel={"recompute": "auto"}, train=settings()["train"] | {"precision": "bf16"})
    planned = plan(RunConfig.model_validate(auto), 2)
    assert (planned.config.parallel.recompute, planned.unproved) == ("auto", "")
    known = proved()
    without = Proved(frozenset(name for name in known.signatures if " | full | " not in name), known.pairs)
    monkeypatch.setattr("megalm.training.plan.proved", lambda: without)
    message = refusal(auto, 2, tmp_path)
    assert "parallel.recompute full" in message and "is not proved to train the model" in message


def test_a_run_keeps_its_float8_for_life(settings: Settings) -> None:
    """Checkpoints of versions without the key were trained without float8."""
    from types import SimpleNamespace

    from megalm.training import resume

    def check(then: bool | None, now: bool, **keys: Any) -> None:
        tree = settings(**keys)
        tree["train"] |= {"precision": "bf16", "fp8": now}
        planned = plan(RunConfig.model_validate(tree | {"parallel": {"zero": 1}}), 1)
        before = planned.config.model_dump()
        if then is None:
            del before["train"]["fp8"]
        else:
            before["train"]["fp8"] = then
        resume.check(SimpleNamespace(config=before), planned, "step-8")

    for then, now in ((None, False), (False, False), (True, True)):
        check(then, now)
    for then, now in ((None, True), (False, True), (True, False)):
        with pytest.raises(MegalmError, match=f"train.fp8={bool(then)} and the config says {now}: the curve would be"):
            check(then, now)
        check(then, now, checkpoint={"allow_changes": ["train.fp8"]})
