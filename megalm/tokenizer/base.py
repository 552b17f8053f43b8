"""What every tokenizer of megalm offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from megalm.errors import MegalmError


class Tokenizer(ABC):
    """Text to ids and back.

    `encode` treats text as data: special tokens that a user types literally come out as ordinary text tokens, never
    as control ids. Control ids are inserted by the caller, through `token_to_id`.
    """

    kind: str
    """Name of the implementation: `sentencepiece` or `huggingface`."""
    vocab_size: int
    """Ids run from 0 to vocab_size - 1."""
    bos_id: int | None
    """Id of the token that is named for the begin of a document, or None. Whether it stands there, `begins` says."""
    eos_id: int
    """Id that ends a document."""
    pad_id: int
    """Id that fills what is masked out of the loss. May equal eos_id."""
    special_tokens: dict[str, int]
    """Control tokens and their ids; no text is ever encoded to them."""
    fingerprint: str
    """Hash of everything that decides ids. Two tokenizers with the same fingerprint write the same shards."""
    begun: str | None = None
    """Where bos_id is named but not put before a text: the fingerprint if it were, as earlier versions had it."""

    @property
    def begins(self) -> list[int]:
        """What stands before every document: bos_id, unless it only ends the document before."""
        return [] if self.bos_id is None or self.bos_id == self.eos_id else [self.bos_id]

    def way_to(self, fingerprint: str | None, other: str) -> str:
        """How to get the tokenizer of another fingerprint. other: where it is not this one with its begin token."""
        if fingerprint is None or fingerprint != self.begun:
            return other
        return (
            "it is the same with its bos_token before every document, which this one does not put there: set "
            "add_bos_token to true in its tokenizer_config.json"
        )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end. Raises MegalmError for lone surrogates, which are not Unicode text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on one thread."""

    def encode_sequence(self, parts: Sequence[str | int]) -> list[list[int]]:
        """Ids of each part of one sequence: texts, none of them empty, and the control ids around them."""
        return [[part] if isinstance(part, int) else self.encode(part) for part in parts]

    def encode_marked(self, text: str) -> list[int] | None:
        """Ids of a text in which control tokens are control ids, as the tokenizer's own library finds them; None where
        it finds none."""
        return None

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special tokens are left out; broken UTF-8 (a model's own sampling) becomes U+FFFD."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Id of a vocabulary entry by name, special tokens included; None where there is none."""

    @abstractmethod
    def byte_counts(self) -> list[int]:
        """Bytes of UTF-8 text that each id stands for: [vocab_size]. Control tokens stand for none."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write a folder that `megalm.tokenizer.load.load` reads back with the same fingerprint."""


def check_unicode(text: str) -> None:
    """Raise MegalmError for a string that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MegalmError(
            f"cannot encode text with the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: it "
            "is half of a character cut in two; decode the text as UTF-8 (errors='replace') first"
        ) from None
