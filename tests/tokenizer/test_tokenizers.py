"""Every text comes back unchanged, ids are the library's own, and control ids never come from text."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.tokenizer.sentence_piece import META_SPACE
from megalm.tokenizer.train import CHUNK_BYTES, _chunks, train

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog 0123456789 don't naïve façade Straße",
    "语言模型预训练需要大量的文本数据。中文没有空格，标点也不同！",
    "اللغة العربية تكتب من اليمين إلى اليسار ١٢٣",
    "हिन्दी देवनागरी लिपि में लिखी जाती है",
    "日本語のひらがなとカタカナ 한국어 자모",
    "Здравствуй мир Ελληνικά עברית ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301 a\u0308\u0323 \u200b\u200d\ufeff\u202e",
    "def f(x):\n\treturn x ** 2  # comment\r\n",
]
ODDITIES = [
    *" \n\t\r\0\x0b\x1b\x7f\u0085\u00a0\u2028\u3000",
    "    ",
    "\n\n\n",
    META_SPACE,
    META_SPACE * 3,
    "\u2585",
    "\u2047",
    "\ufffd",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x41>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
]


def mixed_strings(count: int) -> Iterator[str]:
    """Strings of many scripts, odd whitespace, controls, literal special tokens and random code points."""
    generator = random.Random(0)
    yield ""
    for _ in range(count - 1):
        parts = []
        for _ in range(generator.randint(1, 6)):
            kind = generator.random()
            if kind < 0.5:
                script = generator.choice(SCRIPTS)
                start = generator.randrange(len(script))
                parts.append(script[start : start + generator.randint(1, 30)])
            elif kind < 0.8:
                parts.append(generator.choice(ODDITIES))
            else:
                points = (generator.randrange(0x110000) for _ in range(generator.randint(1, 8)))
                parts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
        yield "".join(parts)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    texts = [*topics.values(), *SCRIPTS * 20]
    return train(lambda: texts, 2000, request.param)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer.json, as Hugging Face writes it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*topics.values(), *SCRIPTS], trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    return folder


def check_round_trip(tokenizer: Tokenizer) -> None:
    strings = list(mixed_strings(10_000))
    control = set(tokenizer.special_tokens.values())
    for text, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert tokenizer.decode(ids).encode() == text.encode()
        assert not control.intersection(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_sentencepiece_returns_ten_thousand_strings_byte_for_byte(trained: Tokenizer) -> None:
    check_round_trip(trained)


def test_byte_level_tokenizer_json_returns_them_too(byte_level: Path) -> None:
    check_round_trip(load(byte_level))


def test_sentencepiece_defaults_fail_the_same_check(tmp_path: Path) -> None:
    """Negative control: a model with the library's own settings loses whitespace and width."""
    (tmp_path / "corpus.txt").write_text("\n".join([*topics.values(), *SCRIPTS * 20]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=2000,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(AssertionError):
        check_round_trip(load(tmp_path / "lossy.model"))


def test_ids_are_sentencepieces_own(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [text for text in [*mixed_strings(500), *topics.values()] if META_SPACE not in text]
    assert trained.encode_batch(texts) == [library.encode(text) for text in texts]
    assert [trained.encode(text) for text in texts[:50]] == trained.encode_batch(texts[:50])


def test_ids_are_transformers_own(byte_level: Path) -> None:
    library = PreTrainedTokenizerFast(
        tokenizer_file=str(byte_level / "tokenizer.json"), split_special_tokens=True, clean_up_tokenization_spaces=False
    )
    texts = [*mixed_strings(500), *topics.values()]
    tokenizer = load(byte_level)
    expected = library(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode_batch(texts) == expected


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<pad>"])
def test_special_tokens_have_ids_but_text_never_gets_them(trained: Tokenizer, byte_level: Path, name: str) -> None:
    for tokenizer in (trained, load(byte_level)):
        i = tokenizer.token_to_id(name)
        assert i == tokenizer.special_tokens[name]
        assert i not in tokenizer.encode(f"a{name}b")
        assert tokenizer.decode([*tokenizer.encode("a"), i, *tokenizer.encode("b")]) == "ab"
    assert trained.token_to_id("no such token") is None


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A folder with a unigram tokenizer.json, among whose pieces special tokens are."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    library.train_from_iterator([*list(topics.values())[:20], "<a> </b> | c"], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return tmp_path


def test_typed_special_tokens_are_text_to_a_unigram_model(pieces: Path, tmp_path: Path) -> None:
    tokenizer = load(pieces)
    library = tokenizers.Tokenizer.from_file(str(pieces / "tokenizer.json"))
    library.encode_special_tokens = True
    for name in ("<s>", "</s>", "<|im_end|>"):
        for text in (name, f"a {name}b", f"a{name}\n{name}"):
            assert tokenizer.special_tokens[name] in library.encode(text).ids  # negative control
            assert tokenizer.special_tokens[name] not in tokenizer.encode(text)
    texts = [line for text in topics.values() for line in text.split("\n")][:2000]
    assert tokenizer.encode_batch(texts) == [library.encode(text, add_special_tokens=False).ids for text in texts]
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (pieces / "tokenizer.json").read_bytes()


def test_a_model_that_knows_special_tokens_as_words_is_refused(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2}
    for kind in (models.WordLevel, models.WordPiece):
        library = tokenizers.Tokenizer(kind(vocab=vocabulary, unk_token="<unk>"))
        library.add_special_tokens(["<unk>", "</s>"])
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        library.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(MegalmError, match="encodes the text </s> as that special token"):
            load(tmp_path)
        library.pre_tokenizer = pre_tokenizers.Whitespace()  # which takes it apart
        library.save(str(tmp_path / "tokenizer.json"))
        assert load(tmp_path).encode("a </s> <unk>") == [2, *[0] * 6]


def test_ends_and_padding(trained: Tokenizer, byte_level: Path) -> None:
    assert trained.bos_id is None
    assert len({trained.eos_id, trained.pad_id}) == 2
    hugging_face = load(byte_level)
    assert hugging_face.bos_id is None
    assert hugging_face.eos_id == hugging_face.token_to_id("<|im_end|>")
    assert hugging_face.pad_id == hugging_face.token_to_id("<pad>")


@pytest.mark.parametrize("added", [None, True, False], ids=["unsaid", "added", "not-added"])
@pytest.mark.parametrize("first", ["<s> ", ""], ids=["put", "not-put"])
@pytest.mark.parametrize("begin", ["<s>", None, "<|endoftext|>"])
def test_a_document_begins_as_transformers_begins_a_text(
    byte_level: Path, begin: str | None, first: str, added: bool | None, tmp_path: Path
) -> None:
    library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    library.add_special_tokens(["<s>"])
    library.post_processor = processors.TemplateProcessing(
        single=f"{first}$A", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": begin, "eos_token": "<|endoftext|>"}
    said = {} if added is None else {"add_bos_token": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | said))
    tokenizer = load(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **settings, **said)
    # a token that ends documents too, or that has no name, begins none
    expected = theirs("ab")["input_ids"] if begin == "<s>" else tokenizer.encode("ab")
    assert [*tokenizer.begins, *tokenizer.encode("ab")] == expected
    assert tokenizer.bos_id == (None if begin is None else tokenizer.token_to_id(begin))
    # tokenizers that begin documents otherwise are told apart, and only they
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    begun = load(tmp_path)
    assert (tokenizer.fingerprint == begun.fingerprint) is (tokenizer.begins == begun.begins)
    assert tokenizer.begun == (begun.fingerprint if tokenizer.begins != begun.begins else None)
    tokenizer.save(tmp_path / "again")
    assert load(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_saved_and_loaded_again(trained: Tokenizer, byte_level: Path, tmp_path: Path) -> None:
    for number, tokenizer in enumerate((trained, load(byte_level))):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        again = load(folder)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.special_tokens == tokenizer.special_tokens
        assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert again.encode("some text\n") == tokenizer.encode("some text\n")
    assert load(tmp_path / "0" / "tokenizer.model").fingerprint == trained.fingerprint


def test_training_is_repeatable_and_fingerprints_differ(trained: Tokenizer) -> None:
    texts = list(topics.values())
    first, second = (train(lambda: texts, 1000) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert len({first.fingerprint, trained.fingerprint, train(lambda: texts[1:], 1000).fingerprint}) == 3


def test_fingerprint_of_tokenizer_json_ignores_what_decides_no_id(byte_level: Path, tmp_path: Path) -> None:
    document = json.loads((byte_level / "tokenizer.json").read_text())
    expected = load(byte_level).fingerprint
    for key, value, same in (("decoder", None, True), ("pre_tokenizer", None, False)):
        folder = tmp_path / key
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(document | {key: value}, indent=3))
        (folder / "tokenizer_config.json").write_bytes((byte_level / "tokenizer_config.json").read_bytes())
        assert (load(folder).fingerprint == expected) is same


def test_long_documents_and_sampling_are_trained_on() -> None:
    """sentencepiece alone would drop a document above 4,192 bytes; sampling takes a part of the text."""
    long_document = "extraordinarily " * 2000
    tokenizer = train(lambda: [long_document, *topics.values()], 1000)
    assert len(tokenizer.encode(" extraordinarily")) == 1
    texts = list(topics.values()) * 3
    sampled = train(lambda: texts, 500, sample_bytes=100_000)
    assert sampled.fingerprint != train(lambda: texts, 500).fingerprint


@pytest.mark.parametrize("salt", ["", "a", "b"])
def test_of_documents_larger_than_the_sample_chunks_are_drawn(salt: str) -> None:
    """Whole documents would be drawn all or not at all: this one with a probability of one in five."""
    document = salt + "".join(topics.values())
    share = 0.2
    drawn = list(_chunks([document], share))
    assert 0.5 * share < sum(map(len, drawn)) / len(document) < 2 * share
    assert drawn == list(_chunks([document], share))
    assert all(chunk in document and len(chunk) <= CHUNK_BYTES for chunk in drawn)
    assert "".join(_chunks([document], 1.0)) == document
    # A text that repeats itself is drawn in part too.
    assert 0 < sum(map(len, _chunks(["word " * 200_000], share))) < 500_000
    assert train(lambda: [document], 500, sample_bytes=len(document) // 5).vocab_size == 500


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 1000, "empty corpus"),
        (["a b c " * 100], 5000, r"too small for a vocabulary of 5000: at most \d+ is possible"),
        (["a b c " * 100], 100, "261 ids are taken"),
        (["".join(map(chr, range(0x4E00, 0x4F00))) * 9], 300, r"at least \d+ is needed"),
    ],
)
def test_what_cannot_be_trained(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(MegalmError, match=message):
        train(lambda: texts, vocab_size)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_largest_possible_vocabulary_is_possible(kind: str) -> None:
    texts = list(topics.values())[:5]
    with pytest.raises(MegalmError) as refused:
        train(lambda: texts, 50_000, kind)
    largest = int(str(refused.value).split("at most ")[1].split()[0])
    assert train(lambda: texts, largest, kind).vocab_size == largest
    with pytest.raises(MegalmError):
        train(lambda: texts, largest + 1, kind)


def test_lone_surrogates_are_refused(trained: Tokenizer, byte_level: Path) -> None:
    for tokenizer in (trained, load(byte_level)):
        for text in ("ab\ud800", META_SPACE + "\udfff"):
            with pytest.raises(MegalmError, match="lone surrogate"):
                tokenizer.encode(text)


def test_what_cannot_be_loaded(trained: Tokenizer, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(MegalmError, match=message):
            load(path)

    refused(tmp_path / "nowhere", "there is no tokenizer")
    refused(tmp_path, "holds no tokenizer")
    (tmp_path / "x.model").write_bytes(b"not a model")
    refused(tmp_path / "x.model", "not a sentencepiece model")
    (tmp_path / "x.json").write_text("{}")
    refused(tmp_path / "x.json", "not a tokenizer.json")
    (tmp_path / "y.json").write_bytes(b"\xff\xfe")
    refused(tmp_path / "y.json", "not UTF-8")
    trained.save(tmp_path / "folder")
    train(topics.values, 500).save(tmp_path / "other")
    (tmp_path / "folder" / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    refused(tmp_path / "folder", "not the model that")
    (tmp_path / "folder" / "megalm_tokenizer.json").write_text("{")
    refused(tmp_path / "folder", "damaged")


def test_tokenizer_json_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MegalmError, match="no end-of-document token"):
        load(tmp_path)


def test_byte_counts_add_up_to_the_text(trained: Tokenizer, byte_level: Path) -> None:
    for tokenizer in (trained, load(byte_level)):
        counts = tokenizer.byte_counts()
        assert len(counts) == tokenizer.vocab_size
        for text in mixed_strings(300):
            assert sum(counts[i] for i in tokenizer.encode(text)) == len(text.encode()), text
        assert all(counts[i] == 0 for i in tokenizer.special_tokens.values())
