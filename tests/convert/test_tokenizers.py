"""The tokenizer that goes with a model gives the same ids."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import transformers

from megalm.convert import gate, tokenizer_files
from megalm.convert.conversion import from_hf, to_hf
from megalm.convert.gate import TEXT
from megalm.convert.tokenizer_files import from_sentencepiece
from megalm.errors import MegalmError
from megalm.eval.load import chat_template
from megalm.tokenizer.chat import NAMED, trained_template
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train
from tests.convert import models
from tests.eval.conftest import save_tokenizer


def strings() -> list[str]:
    """Mixed scripts, spaces of all kinds, control characters, sentencepiece's own sign, and real text."""
    draw = random.Random(0)
    letters = "abc de fgh  \n\t 0123 ▁ ▁▁ \u3000\u00a0\u200d\x00\x07the return <|im_end|> <0x41>" + TEXT
    made = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 60))) for _ in range(2000)]
    made += [text[i : i + 200] for text in topics.values() for i in range(0, min(len(text), 4000), 200)]
    return [
        *made,
        *TEXT.splitlines(keepends=True),
        "",
        " ",
        "  a",
        "a  ",
        "▁",
        "a▁ b",
        "\r\n",
        "<|endoftext|>",
        "<0x41>",
    ]


def test_sentencepiece_bpe_has_no_mismatch(tokenizer_path: Path, tmp_path: Path) -> None:
    ours = load(tokenizer_path)
    tokenizer_files.export(tokenizer_path, ours, tmp_path, 64)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, split_special_tokens=True)
    texts = strings()
    assert len(texts) > 2500
    mismatches = [text for text in texts if theirs.encode(text, add_special_tokens=False) != ours.encode(text)]
    assert not mismatches
    assert not [text for text in texts if theirs.decode(ours.encode(text)) != text]
    # special tokens, and the chat
    assert {name: theirs.convert_tokens_to_ids(name) for name in ours.special_tokens} == ours.special_tokens
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (ours.eos_id, ours.pad_id, None)
    assert len(theirs) == ours.vocab_size
    chat = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rendered = chat.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    ids = chat.encode(rendered, add_special_tokens=False)
    assert ids[0] == ours.token_to_id("<|im_start|>") and ids[-2] == ours.token_to_id("<|im_end|>")


def test_unigram_says_where_it_may_differ(tmp_path: Path) -> None:
    train(lambda: [*topics.values(), TEXT * 20], 600, "unigram").save(tmp_path / "unigram")
    ours = load(tmp_path / "unigram")
    made = from_sentencepiece(tmp_path / "unigram" / "tokenizer.model")
    made.encode_special_tokens = True  # where a user types one, it is text
    texts = strings()
    different = [t for t in texts if made.encode(t, add_special_tokens=False).ids != ours.encode(t)]
    assert len(different) < 0.01 * len(texts)
    for text in different:  # as many pieces, of the same score, in another order
        assert sorted(made.encode(text, add_special_tokens=False).ids) == sorted(ours.encode(text))
    (tmp_path / "out").mkdir()
    [note] = tokenizer_files.export(tmp_path / "unigram", ours, tmp_path / "out", 64)
    assert "equally likely" in note


def test_models_that_change_text_are_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("".join(topics.values()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "nfkc"), vocab_size=500, minloglevel=2
    )
    with pytest.raises(MegalmError, match="changes text before it is encoded"):
        from_sentencepiece(tmp_path / "nfkc.model")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sentencepiece model as Llama 2 has it, alone."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("llama")
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("".join(topics.values()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


CHAT = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "added_tokens_decoder": {
        str(i): {"content": name, "special": True} for i, name in enumerate(("<unk>", "<s>", "</s>"))
    },
}
CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    # name: (tokenizer_config.json, added_tokens.json, what is named)
    "added tokens": ({}, {"<|im_start|>": 600, "<|im_end|>": 601}, "the token <|im_start|> with id 600"),
    "added tokens in the settings": (
        {"added_tokens_decoder": {"600": {"content": "<|im_end|>", "special": True}}},
        {},
        "the token <|im_end|> with id 600",
    ),
    "another token at an id": ({"added_tokens_decoder": {"7": {"content": "[X]"}}}, {}, r"the token \[X\] with id 7"),
    "another end": ({"eos_token": {"content": "<s>"}}, {}, "eos_token=<s>"),
    "no begin": ({"add_bos_token": False}, {}, "add_bos_token=False"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_contradict_a_sentencepiece_model_are_refused(case: str, llama: Path, tmp_path: Path) -> None:
    settings, added, words = CONTRADICTIONS[case]
    shutil.copytree(llama, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(CHAT | settings))
    (tmp_path / "hf" / "added_tokens.json").write_text(json.dumps(added))
    for path in (tmp_path / "hf", tmp_path / "hf" / "tokenizer.model"):
        with pytest.raises(MegalmError, match=f"gives its tokenizer {words.replace('|', '.')}, of which") as raised:
            tokenizer_files.restore(path, tmp_path / "out")
        assert "save a tokenizer.json there" in str(raised.value)
        (tmp_path / "out").rmdir()


def test_the_way_out_of_a_contradiction(llama: Path, tmp_path: Path) -> None:
    """What a chat fine-tune of Llama 2 has, and its own words for it."""
    shutil.copytree(llama, tmp_path / "hf")
    tokens = {"600": {"content": "<|im_start|>", "special": True}, "601": {"content": "<|im_end|>", "special": True}}
    settings = CHAT | {"eos_token": "<|im_end|>", "add_bos_token": False, "added_tokens_decoder": tokens}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "hf")
    ours = tokenizer_files.restore(tmp_path / "hf", tmp_path / "out")
    assert (ours.eos_id, ours.begins, ours.token_to_id("<|im_start|>")) == (theirs.eos_token_id, [], 600)
    assert ours.encode("a text") == theirs.encode("a text")


def test_files_that_agree_with_a_sentencepiece_model_are_taken(llama: Path, tmp_path: Path) -> None:
    tokenizer_files.restore(llama, tmp_path / "alone")
    shutil.copytree(llama, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(CHAT | {"add_bos_token": True}))
    assert tokenizer_files.restore(tmp_path / "hf", tmp_path / "out").begins == [1]


def test_a_dummy_prefix_is_kept(llama: Path, tmp_path: Path) -> None:
    """As Llama 2's tokenizer has it."""
    path = llama / "tokenizer.model"
    ours, made = load(path), from_sentencepiece(path)
    texts = [text for text in strings() if "\x00" not in text]
    assert not [t for t in texts if made.encode(t, add_special_tokens=False).ids != ours.encode(t)]
    assert made.decode(ours.encode("a b")) == "a b"
    # by default transformers puts before a text what megalm puts before a document
    (tmp_path / "out").mkdir()
    tokenizer_files.export(path, ours, tmp_path / "out", 64)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert ours.begins and theirs("a b")["input_ids"] == [*ours.begins, *ours.encode("a b")]


@pytest.mark.parametrize("begin", [None, "<s>"])
@pytest.mark.parametrize("added", [True, False])
def test_the_settings_say_whether_a_begin_token_is_exported(added: bool, begin: str | None, tmp_path: Path) -> None:
    """Whether or not the file puts one before a text."""
    path = save_tokenizer(tmp_path / "bytes", ends=("</s>", "<s>"), begin=begin)
    (tmp_path / "out").mkdir()
    settings = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": added}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load(path)
    tokenizer_files.export(path, ours, tmp_path / "out", 64)
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(tmp_path / "out")
        assert theirs("ab")["input_ids"] == [*ours.begins, *ours.encode("ab")]
    assert (ours.begins != []) is added and load(tmp_path / "out").fingerprint == ours.fingerprint
    assert gate._compare_tokenizers(transformers, ours, tmp_path / "out") == []


def test_an_end_token_that_the_file_adds_is_not_exported(tmp_path: Path) -> None:
    """It would end every prompt."""
    path = save_tokenizer(tmp_path / "bytes", ends=("</s>", "<s>"), begin="<s>")
    document = json.loads((path / "tokenizer.json").read_text())
    end = {"id": "</s>", "ids": [256], "tokens": ["</s>"]}
    document["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    document["post_processor"]["special_tokens"]["</s>"] = end
    (path / "tokenizer.json").write_text(json.dumps(document))
    ours = load(path)
    assert transformers.AutoTokenizer.from_pretrained(path)("ab")["input_ids"][-1] == ours.eos_id
    (tmp_path / "out").mkdir()
    tokenizer_files.export(path, ours, tmp_path / "out", 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("ab")["input_ids"] == [*ours.begins, *ours.encode("ab")]
    assert load(tmp_path / "out").fingerprint == ours.fingerprint


def test_what_transformers_puts_around_a_text_is_noted(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "bytes", ends=("</s>", "<s>"), begin="<s>")
    settings = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    [note] = gate._compare_tokenizers(transformers, load(path), path)
    assert "other special tokens around a text than megalm, which puts none before it" in note


def test_a_chat_goes_with_the_model(tmp_path: Path) -> None:
    """The template that the run was fine-tuned with, and the end of a turn as one of generation's ends."""
    path = save_tokenizer(tmp_path / "bytes", ends=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    model, config = models.build(vocab_size=300)
    for template, stops in ((NAMED["chatml"], ["<|im_end|>"]), (NAMED["plain"], []), (None, None)):
        blend = {"chat_template": template} if template else {}
        step = models.checkpoint(tmp_path / "run", model, config, path, blend=blend)
        assert chat_template(step) == template
        if template:  # as checkpoints had it that kept the hash alone
            assert trained_template({"template": hashlib.sha256(template.encode()).hexdigest()}) == template
        to_hf(step, tmp_path / "hf", verify=False)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert theirs.chat_template == template
        written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
        expected = [theirs.eos_token_id, *theirs.convert_tokens_to_ids(stops or [])]
        assert written == (expected if stops else expected[0])
        shutil.rmtree(tmp_path / "hf")
        shutil.rmtree(tmp_path / "run")


def test_any_tokenizer_json_goes_there_and_back(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "bytes", ends=("<|endoftext|>", "<|im_start|>"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    model, config = models.build(vocab_size=300)  # more rows than ids, as published models have
    step = models.checkpoint(tmp_path / "run", model, config, path)
    to_hf(step, tmp_path / "hf", verify=False)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), load(path)
    assert theirs.chat_template == "{{ messages }}" and theirs.eos_token == "<|endoftext|>"
    assert [theirs.encode(text) for text in TEXT.split("\n")] == ours.encode_batch(TEXT.split("\n"))
    from_hf(tmp_path / "hf", tmp_path / "back", verify=False)
    assert load(tmp_path / "back" / "tokenizer").fingerprint == ours.fingerprint
    shutil.rmtree(path)
    to_hf(tmp_path / "back", tmp_path / "again", verify=False)  # its tokenizer came with it
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
