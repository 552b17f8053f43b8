"""What a fine-tuning run learns from its rows."""

from typing import Literal

from pydantic import Field, PositiveInt

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
