"""What a fine-tuning run learns from its rows."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megalm.config import Config

TaskKind = Literal[
    "chat",
    "summarization",
    "translation",
    "dialogue",
    "continuation",
    "text_classification",
    "pair_classification",
    "token_classification",
    "relation_extraction",
    "question_answering",
]


CLASSIFICATION: tuple[TaskKind, ...] = ("text_classification", "pair_classification", "relation_extraction")
"""Kinds of which a row has one label, or several if multi_label."""


ANSWERED: tuple[TaskKind, ...] = ("chat", "dialogue", "summarization", "translation")
"""Kinds of which a row asks something that is answered by text."""

_CLASSES = ("accuracy", "macro_f1", "micro_f1")
_ENTITIES = ("precision", "recall", "f1")
_ROUGE, _BLEU = ("rouge1", "rouge2", "rougeL"), ("bleu", "chrf")
_SCORES: dict[TaskKind, tuple[str, ...]] = {
    "chat": (*_BLEU, *_ROUGE),
    "dialogue": (*_BLEU, *_ROUGE),
    "summarization": _ROUGE,
    "translation": _BLEU,
    "continuation": (),
    "text_classification": _CLASSES,
    "pair_classification": _CLASSES,
    "relation_extraction": (*_ENTITIES, *_CLASSES),
    "token_classification": (*_ENTITIES, "token_accuracy"),
    "question_answering": ("exact_match", "f1"),
}


class AugmentConfig(Config):
    """More from the same training rows; what is held out stays as it is."""

    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a row's tokens that the model reads as unknown, others each time the row comes; never control tokens."""
    dropout_token: str | None = None
    """What stands in their place. Default: the tokenizer's unknown token, else its padding."""
    synonyms: str | None = None
    """text_classification, pair_classification: file of lines of a word, a tab, and its synonyms with commas between
    them; English words or Chinese strings."""
    synonym_columns: list[str] = Field(default=["text"], min_length=1)
    """Columns of the data in which words are replaced."""
    synonym_share: float = Field(0.1, gt=0, le=1)
    """Share of the words that have synonyms which is replaced."""
    synonym_copies: PositiveInt = 1
    """Copies of each row with replaced words, beside the row itself."""
    class_alpha: float = Field(1.0, ge=0, le=1)
    """One label a row: a class of n rows is seen in proportion to n to this power, by repeating the rows of rare ones.
    1 changes nothing, 0 lets all classes be seen equally often."""


class TaskConfig(Config):
    """Fine-tuning: data.sources and data.held_out then name files of rows (JSONL, JSON, Parquet), not shards."""

    kind: TaskKind = "chat"
    """What a row is. The first five train the language model on text, the others give the model a head of its own."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the data's columns, by what they are (docs/tasks.md). Default: the usual ones of the kind."""
    template: str = "auto"
    """Chat template: `auto` (the tokenizer's own, else chatml, else for all kinds but chat plain), `chatml`, `llama3`,
    `qwen`, `plain`, or a Jinja file."""
    prompt: str | None = None
    """What the model is asked, with columns of the row in braces, as in "Translate into German: {source}". Default: the
    usual of summarization and translation."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Trained tokens: the assistant's, those of its last turn, or all. The end of a turn belongs to it."""
    arrangement: Literal["packed", "padded", "sorted"] = "packed"
    """`packed`: several examples in a row, each isolated; `padded`: one in a row; `sorted`: one, rows of like length
    together, so that less is padding."""
    long_examples: Literal["refuse", "drop", "truncate"] = "truncate"
    """What becomes of an example longer than train.sequence_length. Either is counted."""
    labels: list[str] = Field(default_factory=list)
    """Names of the classes, in the order of their numbers. Default: those in the training rows, sorted."""
    multi_label: bool = False
    """text_classification: a row may have any number of labels, as a list."""
    tag_at: Literal["first", "last"] = "last"
    """token_classification: the token of a word where its tag is read. Only at the last has a causal model read the
    whole word; its first may be no more than a space."""
    none_label: str | None = None
    """relation_extraction: the class that says that there is no relation, which is never counted as found."""
    markers: list[str] = Field(default=["<e1>", "</e1>", "<e2>", "</e2>"], min_length=4, max_length=4)
    """relation_extraction: what stands before and behind both entities in a text; control tokens of the tokenizer, or
    plain text."""
    stride: PositiveInt | None = None
    """question_answering: tokens of a long context that a window shares with the one before. Default: a quarter of a
    window."""
    longest_answer: PositiveInt = 64
    """question_answering: tokens of an answer that is found, at most."""
    unanswerable: bool = False
    """question_answering: a question without an answer is one that its context does not answer, to be found out.
    Otherwise it is left out."""
    augment: AugmentConfig = AugmentConfig()
    """More from the same training rows."""

    @model_validator(mode="after")
    def _augmentable(self) -> "TaskConfig":
        if self.augment.synonyms is not None and self.kind not in (kinds := CLASSIFICATION[:2]):
            raise ValueError(
                f"task.augment.synonyms would move what a row of {self.kind} points at, or change what is learnt to be "
                f"said: leave it out, it serves {' and '.join(kinds)}"
            )
        if self.augment.class_alpha < 1 and (self.kind not in CLASSIFICATION or self.multi_label):
            what = "several labels" if self.multi_label else f"the kind {self.kind}"
            raise ValueError(f"task.augment.class_alpha needs one label a row, and {what} has not: leave it at 1")
        return self


def scores_of(task: TaskConfig | None, answers: bool) -> list[str]:
    """Names of what an evaluation says, the loss first. task: None in pretraining. answers: whether the model writes
    them (evaluate.max_new_tokens)."""
    if task is None:
        return ["loss", "bits_per_byte"]
    scores = _SCORES[task.kind]
    if task.multi_label:
        scores = ("subset_accuracy", *_CLASSES[1:])
    if task.kind in (*ANSWERED, "continuation"):
        return ["loss", "bits_per_byte", "perplexity", *(scores if answers else ())]
    return ["loss", *scores]
