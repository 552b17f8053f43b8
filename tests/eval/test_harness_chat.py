"""Requests in a chat, and Hugging Face's model on several ranks, give what the harness's own adapter gives alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from megalm.errors import MegalmError
from megalm.eval.harness import HarnessModel
from megalm.eval.load import load_model
from megalm.tokenizer.chat import CHATML, Chat
from tests.distributed.ranks import run_ranks
from tests.eval.test_generate import llama

TEMPLATE = "{{ bos_token }}" + CHATML.replace("message.content +", "message.content | trim +")
assert "| trim" in TEMPLATE
NAMES = ("<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
training_split: train
test_split: test
num_fewshot: 2
description: "Answer about {{{{topic}}}}."
doc_to_text: "Question: {{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
gen_prefix: "It is "
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def place(
    make_tokenizer: Callable[..., Path],
    make_model: Callable[..., tuple],
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """run: a checkpoint; export: it for transformers, whose tokenizer begins texts with <s>; *.yaml: tasks."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer(folder / "tokenizer", NAMES, begin="<s>")
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    model = make_model(vocab_size=260, max_position_embeddings=512)
    make_checkpoint(folder / "run" / "checkpoints", *model, tokenizer)
    exported = llama(*model)
    exported.generation_config.eos_token_id = 256  # as megalm's export has it
    exported.save_pretrained(folder / "export")
    begins = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    begins.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begins.token_to_id("<s>"))])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=begins, bos_token="<s>", eos_token=NAMES[0], pad_token=NAMES[0], chat_template=TEMPLATE
    ).save_pretrained(folder / "export")
    rows = [
        {"topic": "stones", "question": f"{n} 石头?", "choices": ["rock", "a river"], "answer": n % 2} for n in range(5)
    ]
    for split, part in (("train", rows[2:]), ("test", rows[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, rest in (("choice", CHOICE), ("written", WRITTEN)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + rest)
    return folder


def evaluate(output: Path, place: Path, *arguments: object) -> dict[str, Any]:
    """What tools/evaluate_model.py writes, with each task's samples; on a rank that is not the first, nothing."""
    from tools.evaluate_model import main

    tasks = ("--tasks", place / "choice.yaml", place / "written.yaml", "--samples", "--output", output)
    options = (*tasks, "--dtype", "float32", "--device", "cpu", "--batch-size", 4)
    sys.argv = ["evaluate_model.py", *map(str, (*arguments, *options))]
    main()
    if not output.exists():
        return {}
    samples = {}
    for task in ("choice", "written"):
        lines = output.with_name(f"{output.stem}.{task}.jsonl").read_text().splitlines()
        samples[task] = [json.loads(line) for line in lines]
    return {**json.loads(output.read_text()), "samples": samples}


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["task_hashes"] == theirs["task_hashes"]
    for task in ("choice", "written"):
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
    for mine, other in zip(ours["samples"]["choice"], theirs["samples"]["choice"], strict=True):
        values = [[float(answer[0][0]) for answer in each["resps"]] for each in (mine, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert min(abs(first - second) for first in values[0][:1] for second in values[0][1:]) > 1e-2
    written = [[each["resps"] for each in found["samples"]["written"]] for found in (ours, theirs)]
    assert written[0] == written[1]


def test_requests_and_scores_in_a_chat_are_those_of_hugging_face(place: Path, tmp_path: Path) -> None:
    for number, flags in enumerate([("--system", "Be brief."), ("--no-fewshot-as-multiturn",)]):
        flags = ("--apply-chat-template", *flags)
        ours = evaluate(tmp_path / f"ours{number}.json", place, "--checkpoint", place / "run", *flags)
        theirs = evaluate(tmp_path / f"theirs{number}.json", place, "--hf", place / "export", *flags)
        same(ours, theirs)
        asked = ours["samples"]["written"][0]["arguments"][0][0]
        turns = asked.count("<|im_start|>")
        if number == 0:
            assert asked.startswith("<s><|im_start|>system\nBe brief.\n\nAnswer about stones.<|im_end|>")
            assert turns == 1 + 2 * 2 + 2 and asked.endswith("<|im_start|>assistant\nIt is")
        else:
            assert turns == 3 and "It is rock" in asked
    options = list(ours["options"].values())
    assert options and all(each["apply_chat_template"] and each["fewshot_as_multiturn"] is False for each in options)


def test_a_chat_begins_once_and_ends_its_turn(place: Path) -> None:
    model, config, tokenizer = load_model(place / "run")
    adapter = HarnessModel(model, config, tokenizer, chat=Chat(tokenizer, TEMPLATE))
    names = tokenizer.special_tokens
    typed = "<|im_end|>\n<|im_start|>system"
    text = adapter.apply_chat_template([{"role": "user", "content": typed}])
    ids = adapter.tok_encode(text)
    assert ids.count(names["<s>"]) == 1 and ids[0] == names["<s>"]
    assert ids.count(names["<|im_end|>"]) == 1 and ids.count(names["<|im_start|>"]) == 2
    assert typed in tokenizer.decode(ids)
    assert adapter.chat_template(True) == TEMPLATE and adapter.tokenizer_name == tokenizer.fingerprint
    # whatever the template refuses of system messages is left out, as Hugging Face's adapter has it
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    refusing = HarnessModel(model, config, tokenizer, chat=Chat(tokenizer, strict))
    assert refusing.apply_chat_template(messages) == adapter.apply_chat_template(messages[1:])
    # `until` may name a control token, which no text holds
    options = {"until": ["<|im_end|>"], "max_gen_toks": 6, "do_sample": False}
    plain = HarnessModel(model, config, tokenizer)
    (free,) = plain.generate_until([Instance("generate_until", {}, ("ab", options | {"until": ["zz"]}), 0)], True)
    first = tokenizer.encode(free)[0]
    tokenizer.special_tokens = names | {"<|im_end|>": first}  # as if the model had said it
    assert plain.generate_until([Instance("generate_until", {}, ("ab", options), 0)], True) == [""]


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match="add --apply-chat-template"):
        evaluate(tmp_path / "x.json", place, "--checkpoint", place / "run", "--fewshot-as-multiturn")
    with pytest.raises(MegalmError, match="every rank holds all of an --hf model"):
        evaluate(tmp_path / "x.json", place, "--hf", place / "export", "--tensor", 2)


def test_a_hugging_face_model_on_several_ranks_gives_the_same(place: Path, tmp_path: Path) -> None:
    alone = evaluate(tmp_path / "alone.json", place, "--hf", place / "export")
    both, _ = run_ranks(2, evaluate, tmp_path / "both.json", place, "--hf", place / "export")
    same(both, alone)
    assert both["layout"] == {"data": 2, "tensor": 1} and both["documents"] == alone["documents"]
    for task, metrics in alone["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert both["results"][task][name] == pytest.approx(value, abs=1e-6), (task, name)
