"""sentencepiece models (Kudo and Richardson 2018), made lossless."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer, check_unicode

MODEL_FILE = "tokenizer.model"
METADATA_FILE = "megalm_tokenizer.json"
META_SPACE = "\u2581"
"""sentencepiece writes this character for a space, so the character itself would come back as a space."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece .model.

    Models that megalm trains return every text unchanged. The one character that sentencepiece cannot hold, U+2581
    (its own sign for a space), is encoded through its three byte pieces. Models trained elsewhere are used as they
    are: their normaliser may change text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor = self._processor
        self.vocab_size = processor.vocab_size()
        self.special_tokens = {
            processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        if processor.eos_id() < 0:
            raise MegalmError(
                "the sentencepiece model has no end-of-document token (eos_id is -1), which shards need: train it with "
                "tools/train_tokenizer.py, or with eos_id set"
            )
        self.eos_id = processor.eos_id()
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._meta_space = self._byte_pieces(META_SPACE)

    def _byte_pieces(self, character: str) -> list[int] | None:
        """Byte pieces of a character; None if the model has none, or if it prefixes text (then text is not split)."""
        pieces = [f"<0x{byte:02X}>" for byte in character.encode()]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        prefixes = "".join(self._processor.encode("a", out_type=str)).startswith(META_SPACE)
        return None if prefixes or not all(self._processor.is_byte(i) for i in ids) else ids

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            if self._meta_space is None or not any(META_SPACE in text for text in texts):
                return self._processor.encode(list(texts), num_threads=1)
            parts = [text.split(META_SPACE) for text in texts]
            encoded = iter(self._processor.encode([part for row in parts for part in row], num_threads=1))
        except (RuntimeError, TypeError):
            for text in texts:
                check_unicode(text)
            raise
        rows = []
        for row in parts:
            ids = next(encoded)
            for _ in row[1:]:
                ids = ids + self._meta_space + next(encoded)
            rows.append(ids)
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_to_id(self, token: str) -> int | None:
        i = self._processor.piece_to_id(token)
        return i if self._processor.id_to_piece(i) == token else None

    def byte_counts(self) -> list[int]:
        processor = self._processor

        def count(i: int) -> int:
            if processor.is_byte(i):
                return 1
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                return 0
            return len(processor.id_to_piece(i).replace(META_SPACE, " ").encode())

        return [count(i) for i in range(self.vocab_size)]

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        metadata = {
            "format": "megalm-tokenizer",
            "version": 1,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "special_tokens": self.special_tokens,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MODEL_FILE).write_bytes(self._model)
            (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise MegalmError(f"cannot write the tokenizer to {folder}: {error.strerror}") from error


def load_model(path: Path) -> SentencePieceTokenizer:
    """Read a sentencepiece .model. Raises MegalmError when it is unreadable or not one."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise MegalmError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    try:
        return SentencePieceTokenizer(model)
    except RuntimeError as error:
        raise MegalmError(f"{path} is not a sentencepiece model: name another file, or train one anew") from error
    except MegalmError as error:
        raise MegalmError(f"{path}: {error}") from None


def load_folder(folder: Path) -> SentencePieceTokenizer:
    """Read a folder that `save` wrote; the model must be the one its metadata describes."""
    tokenizer = load_model(folder / MODEL_FILE)
    metadata_file = folder / METADATA_FILE
    if metadata_file.exists():
        try:
            expected = json.loads(metadata_file.read_text())["fingerprint"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise MegalmError(f"{metadata_file} is damaged ({error}): copy the tokenizer folder again") from error
        if expected != tokenizer.fingerprint:
            raise MegalmError(
                f"{folder / MODEL_FILE} is not the model that {metadata_file.name} beside it describes (fingerprint "
                f"{tokenizer.fingerprint[:12]}, expected {expected[:12]}): copy the tokenizer folder again"
            )
    return tokenizer
