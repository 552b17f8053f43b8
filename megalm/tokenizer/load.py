"""Read any tokenizer."""

from pathlib import Path

from megalm.errors import MegalmError
from megalm.tokenizer import hugging_face, sentence_piece
from megalm.tokenizer.base import Tokenizer

FILES = (sentence_piece.METADATA_FILE, sentence_piece.MODEL_FILE, hugging_face.TOKENIZER_FILE)


def is_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds what load() reads."""
    return any((Path(folder) / name).exists() for name in FILES)


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer folder, a sentencepiece .model or a Hugging Face tokenizer.json.

    A folder that holds both is read as sentencepiece if megalm wrote it, else as tokenizer.json.
    Raises MegalmError when it is missing, unreadable or neither.
    """
    path = Path(path)
    if not path.exists():
        raise MegalmError(f"there is no tokenizer at {path}: correct the path, or run tools/train_tokenizer.py")
    if path.is_dir():
        if (path / sentence_piece.METADATA_FILE).exists():
            return sentence_piece.load_folder(path)
        if (path / hugging_face.TOKENIZER_FILE).exists():
            return hugging_face.load_json(path / hugging_face.TOKENIZER_FILE)
        if (path / sentence_piece.MODEL_FILE).exists():
            return sentence_piece.load_folder(path)
        raise MegalmError(
            f"{path} holds no tokenizer: it has neither {sentence_piece.MODEL_FILE} nor {hugging_face.TOKENIZER_FILE}"
        )
    return hugging_face.load_json(path) if path.suffix == ".json" else sentence_piece.load_model(path)
