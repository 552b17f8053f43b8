"""A tokenizer beside a model: tokenizer.json with the same ids, and what transformers wants to know about it."""

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, processors

from megalm.convert.folder import read_json
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.hugging_face import NEVER, TOKENIZER_FILE
from megalm.tokenizer.load import load
from megalm.tokenizer.sentence_piece import META_SPACE, MODEL_FILE

SETTINGS_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
COMPANIONS = (SETTINGS_FILE, "special_tokens_map.json", TEMPLATE_FILE)
"""Files beside a tokenizer.json that say what its ends are and how a chat is written."""


def export(path: Path, tokenizer: Tokenizer, folder: Path, longest: int, template: str | None = None) -> list[str]:
    """Write the tokenizer that was loaded from `path` for transformers. longest: sequence of the model. template: of
    chats, in place of the one beside it.

    Returns what a user should know of it, a sentence each.

    Raises MegalmError for a sentencepiece model whose ids tokenizer.json cannot give.
    """
    beside = path if path.is_dir() else path.parent
    for name in COMPANIONS:
        if (beside / name).exists():
            shutil.copyfile(beside / name, folder / name)
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    if tokenizer.kind == "huggingface":
        shutil.copyfile(path / TOKENIZER_FILE if path.is_dir() else path, folder / TOKENIZER_FILE)
        made = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    else:
        made = from_sentencepiece(path / MODEL_FILE if path.is_dir() else path)
        made.save(str(folder / TOKENIZER_FILE))
    plain = made.encode("a", add_special_tokens=False).ids
    if made.encode("a").ids != [*tokenizer.begins, *plain]:  # transformers goes by the file, not by add_bos_token
        begins = [(str(made.id_to_token(i)), i) for i in tokenizer.begins]
        before = [token for token, _ in begins]
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A"], pair=[*before, "$A", *before, "$B"], special_tokens=begins
        )
        # all else stays as it is written, and with it the fingerprint
        document = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        document["post_processor"] = json.loads(made.to_str())["post_processor"]
        (folder / TOKENIZER_FILE).write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
    settings: dict[str, Any] = {}
    if (folder / SETTINGS_FILE).exists():
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if template is not None:
        settings.pop("chat_template", None)
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    if tokenizer.pad_id != tokenizer.eos_id:
        ends["pad_token"] = tokenizer.pad_id
    defaults: dict[str, Any] = {
        # the class that takes tokenizer.json as it is; others bring rules of their own
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    } | {role: made.id_to_token(i) for role, i in ends.items() if i is not None}
    (folder / SETTINGS_FILE).write_text(
        json.dumps(defaults | settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if tokenizer.kind == "sentencepiece" and isinstance(made.model, models.Unigram):
        return [
            "the tokenizer is a unigram model: where two splits of a text are equally likely (a long run of one "
            "character), tokenizer.json may take the other one"
        ]
    return []


def restore(path: Path, folder: Path) -> Tokenizer:
    """Copy a tokenizer from a Hugging Face folder (or another path) into `folder`, and load it from there.

    Raises MegalmError if there is none, or none that megalm reads, or if it is a sentencepiece model that the files
    beside it contradict.
    """
    beside = path if path.is_dir() else path.parent
    folder.mkdir()
    tokenizer = load(path)
    if tokenizer.kind == "sentencepiece":
        _refuse_contradiction(beside, tokenizer)
    file = TOKENIZER_FILE if tokenizer.kind == "huggingface" else MODEL_FILE
    shutil.copyfile(path / file if path.is_dir() else path, folder / file)
    for name in COMPANIONS:
        if (beside / name).exists():
            shutil.copyfile(beside / name, folder / name)
    copied = load(folder)
    assert copied.fingerprint == tokenizer.fingerprint
    return copied


def _refuse_contradiction(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise MegalmError if files beside a sentencepiece model add or change what the model alone does not say."""
    settings, added = (
        read_json(folder / name) if (folder / name).exists() else {} for name in (SETTINGS_FILE, ADDED_FILE)
    )
    added = added | {_spelled(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    wrong = [f"the token {token} with id {i}" for token, i in added.items() if tokenizer.token_to_id(token) != i]
    eos, begun = _spelled(settings.get("eos_token")), settings.get("add_bos_token")
    if eos is not None and tokenizer.token_to_id(eos) != tokenizer.eos_id:
        wrong.append(f"eos_token={eos}")
    if begun is not None and begun != bool(tokenizer.begins):
        wrong.append(f"add_bos_token={begun}")
    if wrong:
        raise MegalmError(
            f"{folder} gives its tokenizer {wrong[0]}, of which its sentencepiece model knows nothing: save a "
            f"{TOKENIZER_FILE} there, with transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )


def _spelled(token: Any) -> Any:
    """A token's text, where tokenizer_config.json may say more of it."""
    return token["content"] if isinstance(token, dict) else token


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A sentencepiece model as a tokenizer.json that gives the same ids.

    Pieces are written with plain spaces instead of sentencepiece's sign for them, so that the sign itself, where it
    stands in a text, is encoded as megalm does it: through its bytes.

    Raises MegalmError for a model that changes text before it is encoded, as megalm's own never do.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
        raise MegalmError(
            f"the sentencepiece model {path} changes text before it is encoded ({rules.name or 'white space'}), which "
            "tokenizer.json would not do alike: train one with tools/train_tokenizer.py, or give a tokenizer.json"
        )
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    spelled = [
        (piece.replace(META_SPACE, " ") if kind in (kinds.NORMAL, kinds.USER_DEFINED) else piece, score, kind)
        for piece, score, kind in pieces
    ]
    unknown = next(i for i, (_, _, kind) in enumerate(spelled) if kind == kinds.UNKNOWN)
    if trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE:
        model: Any = models.BPE(
            vocab={piece: i for i, (piece, _, _) in enumerate(spelled)},
            merges=_merges({piece: score for piece, score, kind in spelled if kind == kinds.NORMAL}),
            unk_token=spelled[unknown][0],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM:
        # sentencepiece never finds control and byte pieces in a text; here, a score keeps them from being worth it
        text_kinds = (kinds.NORMAL, kinds.USER_DEFINED)
        model = models.Unigram(
            [(piece, score if kind in text_kinds else NEVER) for piece, score, kind in spelled],
            unk_id=unknown,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise MegalmError(f"the sentencepiece model {path} is neither BPE nor unigram: train it as one of them")
    made = tokenizers.Tokenizer(model)
    if rules.add_dummy_prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(META_SPACE, " ")])
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p, _, k in spelled if k in (kinds.CONTROL, kinds.UNKNOWN)]
    )
    defined = [AddedToken(piece, normalized=False) for piece, _, kind in spelled if kind == kinds.USER_DEFINED]
    made.add_tokens(defined)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    assert made.get_vocab_size() == expected
    return made


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of sentencepiece's BPE, which joins the two neighbours whose piece has the highest score."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, len(left), left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
