"""The tokenizer that goes with a model gives the same ids."""

import hashlib
import json
import random
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import transformers

from megalm.convert import tokenizer_files
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


def test_a_dummy_prefix_is_kept(tmp_path: Path) -> None:
    """As Llama 2's tokenizer has it."""
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("".join(topics.values()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    ours, made = load(tmp_path / "llama.model"), from_sentencepiece(tmp_path / "llama.model")
    texts = [text for text in strings() if "\x00" not in text]
    assert not [t for t in texts if made.encode(t, add_special_tokens=False).ids != ours.encode(t)]
    assert made.decode(ours.encode("a b")) == "a b"
    # by default transformers puts before a text what megalm puts before a document
    (tmp_path / "out").mkdir()
    tokenizer_files.export(tmp_path / "llama.model", ours, tmp_path / "out", 64)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert ours.begins and theirs("a b")["input_ids"] == [*ours.begins, *ours.encode("a b")]


def test_a_begin_token_that_only_the_settings_add_is_exported(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "bytes", ends=("</s>", "<s>"))
    (tmp_path / "out").mkdir()
    for added in (True, False):
        settings = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": added}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        ours = load(path)
        tokenizer_files.export(path, ours, tmp_path / "out", 64)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs("ab")["input_ids"] == [*ours.begins, *ours.encode("ab")]
        assert (ours.begins != []) is added and load(tmp_path / "out").fingerprint == ours.fingerprint


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
