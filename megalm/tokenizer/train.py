"""Train a lossless sentencepiece tokenizer."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import sentencepiece

from megalm.errors import MegalmError
from megalm.tokenizer.sentence_piece import META_SPACE, SentencePieceTokenizer

UNKNOWN, END, PADDING = "<unk>", "<|endoftext|>", "<pad>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHUNK_BYTES = 4000
"""sentencepiece drops longer sentences in silence (max_sentence_length), so documents are handed over in chunks."""
UNTRAINABLE = re.compile(f"[\0{META_SPACE}\u2585]+")
"""sentencepiece reserves these and would skip the whole chunk; they reach the ids through byte pieces."""


def train(
    read_texts: Callable[[], Iterable[str]],
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    special_tokens: Sequence[str] = CHAT_TOKENS,
    sample_bytes: int = 100_000_000,
) -> SentencePieceTokenizer:
    """Train on about sample_bytes of the text of a corpus.

    There is no begin-of-document token: a token that training data never holds would be noise wherever it is used.
    `<|endoftext|>` ends a document and so stands before the next one. Special tokens are control symbols, which no
    text is encoded to.

    Args:
        read_texts: called twice (to measure and to sample), returns the documents in a fixed order.
        vocab_size: ids in all, with 3 + len(special_tokens) control tokens and 256 byte pieces.
        sample_bytes: bounds memory, about 10 (BPE) to 30 (unigram) times as much. Chunks of up to CHUNK_BYTES
            are drawn by a hash of their content and their place in the document, so the same corpus gives the same
            tokenizer, and a document longer than the sample is drawn in part.

    Raises:
        MegalmError: the corpus is empty, or too small or too varied for vocab_size (with the nearest that works).
    """
    total = sum(len(text.encode("utf-8", "replace")) for text in read_texts())
    if total == 0:
        raise MegalmError("cannot train a tokenizer on an empty corpus: name one that holds text")
    smallest = 256 + 3 + len(special_tokens)
    if vocab_size <= smallest:
        raise MegalmError(
            f"vocab_size {vocab_size} is too small: {smallest} ids are taken by byte pieces and special tokens"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(read_texts(), min(1.0, sample_bytes / total)),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * CHUNK_BYTES,
            train_extremely_large_corpus=sample_bytes > 1_000_000_000,
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            unk_piece=UNKNOWN,
            eos_piece=END,
            pad_piece=PADDING,
            control_symbols=list(special_tokens),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size, total) from error
    return SentencePieceTokenizer(model.getvalue())


def _chunks(texts: Iterable[str], share: float) -> Iterator[str]:
    """Chunks of at most CHUNK_BYTES characters, cut at line ends where possible: the share of them that is drawn."""
    for text in texts:
        cut = (chunk for part in UNTRAINABLE.split(text.encode("utf-8", "replace").decode()) for chunk in _cut(part))
        for number, chunk in enumerate(cut):
            content = f"{number}:{chunk}".encode()
            draw = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
            if draw < share:
                yield chunk


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = start + CHUNK_BYTES
        if stop < len(text):
            stop = (text.rfind("\n", start, stop) + 1) or stop
        yield text[start:stop]
        start = stop


def _explain(message: str, vocab_size: int, corpus_bytes: int) -> MegalmError:
    """sentencepiece's message as a sentence with a way out."""
    if found := re.search(r"Vocabulary size too high .*?<= (\d+)", message):
        return MegalmError(
            f"the corpus ({corpus_bytes:,} bytes) is too small for a vocabulary of {vocab_size}: at most "
            f"{found[1]} is possible; lower --vocab-size or give more text"
        )
    if found := re.search(r"smaller than required_chars\.? *(\d+) vs (\d+)", message):
        return MegalmError(
            f"vocab_size {vocab_size} is too small for the characters of the corpus: at least {int(found[2]) + 1} is "
            "needed; raise --vocab-size"
        )
    return MegalmError(f"sentencepiece could not train a vocabulary of {vocab_size}: {message}")
