"""Hugging Face's tokenizer.json behind megalm's interface."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer, check_unicode

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
"""What the library takes for white space next to a token with lstrip or rstrip: less than Python does."""
NEVER = -1e4
"""Score of a unigram's piece that no text is worth."""
DECIDING_KEYS = ("model", "normalizer", "pre_tokenizer", "added_tokens")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` library.

    Begin, end and padding tokens are not in tokenizer.json: they come from tokenizer_config.json or
    special_tokens_map.json beside it, else from well-known names. A begin token stands before documents if
    add_bos_token there says so or, where it says nothing, if the tokenizer's post-processor puts it before a text.
    """

    kind = "huggingface"

    def __init__(self, document: str, names: dict[str, Any]) -> None:
        self._document = document
        self._names = names
        self._tokenizer = _open(document)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        special = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_tokens = {token.content: i for i, token in special.items()}
        self._strips_before = {i for i, token in special.items() if token.lstrip}
        self._strips_behind = {i for i, token in special.items() if token.rstrip}
        eos = self._special_id("eos_token", EOS_NAMES)
        if eos is None:
            raise MegalmError(
                "the tokenizer names no end-of-document token, which shards need: put its tokenizer_config.json with "
                "eos_token beside tokenizer.json"
            )
        self.eos_id = eos
        self.bos_id = self._special_id("bos_token", ())
        pad = self._special_id("pad_token", PAD_NAMES)
        self.pad_id = eos if pad is None else pad
        explicit = names.get("add_bos_token")
        self._begins = self._tokenizer.encode("a").ids[:1] == [self.bos_id] if explicit is None else bool(explicit)
        parsed = json.loads(document)
        self._refuse_typed(parsed["model"])
        deciding: dict[str, Any] = {key: parsed.get(key) for key in DECIDING_KEYS}
        deciding["ends"] = [self.bos_id, self.eos_id]
        self.fingerprint = _fingerprint(deciding)
        if super().begins and not self.begins:
            self.begun, self.fingerprint = self.fingerprint, _fingerprint(deciding | {"begins": []})

    @property
    def begins(self) -> list[int]:
        return super().begins if self._begins else []

    def _special_id(self, role: str, well_known: tuple[str, ...]) -> int | None:
        if role in self._names:
            name = self._names[role]
            return None if name is None else self.token_to_id(name)
        return next((self.special_tokens[name] for name in well_known if name in self.special_tokens), None)

    def _refuse_typed(self, model: dict[str, Any]) -> None:
        """Raise MegalmError if the model finds a special token in a text where it is typed."""
        # what stands for unknown text is no control token
        unknown = model.get("unk_id", self.token_to_id(model.get("unk_token") or ""))
        for token, i in self.special_tokens.items():
            if i != unknown and i in self.encode(f"{token} {token}\n{token}"):
                raise MegalmError(
                    f"the tokenizer encodes the text {token} as that special token, so that whoever types it ends a "
                    "document or a turn: choose a tokenizer that splits such a text, byte-level BPE for one"
                )

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [_ids(self._tokenizer, text) for text in texts]

    def encode_sequence(self, parts: Sequence[str | int]) -> list[list[int]]:
        parts = _stripped(parts, self._strips_behind, lambda text: text.lstrip(WHITE_SPACE))
        parts = _stripped(parts[::-1], self._strips_before, lambda text: text.rstrip(WHITE_SPACE))[::-1]
        return [
            [part] if isinstance(part, int) else _ids(self._inner if place else self._tokenizer, part)
            for place, part in enumerate(parts)
        ]

    @cached_property
    def _inner(self) -> tokenizers.Tokenizer:
        """What encodes a text behind others: Metaspace's prepend_scheme "first" is about the first one."""
        document = json.loads(self._document)
        steps = json.dumps(document.get("pre_tokenizer"))
        inner = steps.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        return self._tokenizer if inner == steps else _open(json.dumps(document | {"pre_tokenizer": json.loads(inner)}))

    def encode_marked(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            return _ids(self._tokenizer, text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def byte_counts(self) -> list[int]:
        """Exact for byte-level and byte-fallback vocabularies; of others, as their entries are spelled."""
        spelled = json.loads(self._document)
        levels = [part for part in (spelled.get("decoder"), spelled.get("pre_tokenizer")) if part]
        byte_level = any(_holds(part, "ByteLevel") for part in levels)
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        counts = [0] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if token in self.special_tokens:
                continue
            if token in added or not byte_level:
                one = BYTE_PIECE.fullmatch(token)
                counts[i] = 1 if one else len(token.removeprefix("##").replace("\u2581", " ").encode())
            else:
                counts[i] = len(token)  # each byte is one character there
        return counts

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKENIZER_FILE).write_text(self._document, encoding="utf-8")
            (folder / CONFIG_FILES[-1]).write_text(json.dumps(self._names, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise MegalmError(f"cannot write the tokenizer to {folder}: {error.strerror}") from error


def _fingerprint(deciding: dict[str, Any]) -> str:
    canonical = json.dumps(deciding, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _open(document: str) -> tokenizers.Tokenizer:
    """What encodes special tokens that are typed as the text they are."""
    opened = tokenizers.Tokenizer.from_str(document)
    if isinstance(opened.model, models.Unigram):  # where they are pieces too, of a score as good as any
        parsed = json.loads(document)
        special = {token["content"] for token in parsed["added_tokens"] if token["special"]}
        vocabulary = [[piece, NEVER if piece in special else score] for piece, score in parsed["model"]["vocab"]]
        opened = tokenizers.Tokenizer.from_str(json.dumps(parsed | {"model": parsed["model"] | {"vocab": vocabulary}}))
    opened.no_truncation()
    opened.no_padding()
    opened.encode_special_tokens = True
    return opened


def _ids(library: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError):
        check_unicode(text)
        raise
    return ids


def _stripped(parts: Sequence[str | int], strips: set[int], strip: Callable[[str], str]) -> list[str | int]:
    """Parts of a sequence without the white space next to, in their order, the control ids that take it."""
    found, taken = list[str | int](), False
    for part in parts:
        if isinstance(part, int):
            taken = part in strips
        elif taken:
            part = strip(part)
            taken = not part
        found.append(part)
    return found


def load_json(path: Path) -> HuggingFaceTokenizer:
    """Read a tokenizer.json and, if present, the configuration beside it. Raises MegalmError when unreadable."""
    try:
        document = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MegalmError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MegalmError(f"{path} is not a tokenizer.json: it is not UTF-8 text") from error
    names: dict[str, Any] = {}
    for config_file in (path.parent / name for name in CONFIG_FILES):
        if config_file.exists():
            names.update(_names(config_file))
    try:
        return HuggingFaceTokenizer(document, names)
    except MegalmError as error:
        raise MegalmError(f"{path}: {error}") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise MegalmError(f"{path} is not a tokenizer.json that the tokenizers library reads: {error}") from error


def _names(config_file: Path) -> dict[str, Any]:
    """Names of the begin, end and padding tokens in a tokenizer_config.json or special_tokens_map.json, and whether
    the first is added."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MegalmError(f"{config_file} is damaged ({error}): copy the tokenizer folder again") from error
    roles = ("bos_token", "eos_token", "pad_token", "add_bos_token")
    values = {role: config[role] for role in roles if role in config}
    return {role: value["content"] if isinstance(value, dict) else value for role, value in values.items()}


def _holds(part: Any, kind: str) -> bool:
    """Whether a step of a tokenizer.json is of this kind, or a sequence that has one."""
    inner = [each for value in part.values() if isinstance(value, list) for each in value if isinstance(each, dict)]
    return part.get("type") == kind or any(_holds(each, kind) for each in inner)
