"""Tasks whose answer is text: conversations, and what is asked of a text as one.

Each is a way from a row to a conversation; the template, the mask and the ids are the same for all.
"""

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.config import DataConfig
from megalm.data.examples import Example
from megalm.errors import MegalmError
from megalm.sft.config import TaskConfig, TaskKind
from megalm.sft.messages import Columns, Conversation, alternating, conversation
from megalm.sft.task import Refused, Shortened
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.chat import NAMED, Chat, Unmarked, lacking, read_template

PROMPTS: Mapping[TaskKind, str] = {
    "summarization": "Summarize the following text.\n\n{document}",
    "translation": "Translate the following text.\n\n{source}",
}
"""What is asked where task.prompt says nothing."""
BETWEEN_LANGUAGES = "Translate the following text from {source_language} to {target_language}.\n\n{source}"
"""Where the row says which they are."""


def causal(ids: Sequence[int], trained: Sequence[bool] | np.ndarray) -> Example:
    """A text's n + 1 ids as n positions, each of which says the next id; trained: of each id, [n + 1]."""
    return Example(np.array(ids[:-1]), np.array(ids[1:]), np.array(trained[1:], np.uint8))


_UNTOLD = "a turn of weight 0 that the template does not tell from others"


class ConversationTask:
    """Conversations, of which the assistant's part is trained, or its last turn, or all (task.train_on); never a turn
    of weight 0."""

    def __init__(self, config: TaskConfig, chat: Chat, read: Callable[[Mapping[str, Any]], Conversation]) -> None:
        self.chat = chat
        # The hash is compared when a run goes on; the text is what generation and exports need.
        template = {"template": hashlib.sha256(chat.template.encode()).hexdigest(), "chat_template": chat.template}
        self.facts: Mapping[str, Any] = template
        self._config = config
        self._read = read

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        return [self._example(self._read(row))]

    def _example(self, found: Conversation) -> Example:
        train_on = self._config.train_on
        weights = [message.get("weight", 1) for message in found.messages if message["role"] == "assistant"]
        try:
            if train_on == "all" and all(weights):
                ids = self.chat.encode(found.messages, reply=False, tools=found.tools)
                return causal(ids, [True] * len(ids))
            ids, turns = self.chat.answers(found.messages, found.tools)
        except Unmarked:
            if train_on == "all":
                raise Refused(_UNTOLD) from None
            raise
        except MegalmError as error:
            raise Refused(str(error).partition(":")[0]) from None
        if all(weights):
            weights = [1] * len(turns)  # a template may mark a turn in pieces
        elif len(weights) != len(turns):
            raise Refused(_UNTOLD)
        weighted = [*zip(turns, weights)]
        trained = np.full(len(ids), train_on == "all")
        for (start, stop), weight in weighted[-1:] if train_on == "last" else weighted:
            trained[start:stop] = weight
        if not trained[1:].any():
            none = "no token of the assistant in what the template writes"
            raise Refused(none if all(weights) else "no turn of a weight above 0 to train on")
        return causal(ids, trained)


class SummaryTask(ConversationTask):
    """A document and what is said of it: a long one is cut, not the summary behind it."""

    def __init__(
        self, config: TaskConfig, chat: Chat, read: Callable[[Mapping[str, Any], str | None], Conversation]
    ) -> None:
        """read: given also a text in the document's place, if there is one."""
        super().__init__(config, chat, lambda row: read(row, None))
        self._read_with = read
        prompt = config.prompt or PROMPTS["summarization"]
        self._copies = sum(name == "document" for _, name, _, _ in string.Formatter().parse(prompt)) or 1

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        [whole] = super().examples(row)
        return [Shortened(whole.ids, whole.labels, whole.weights, partial(self._at, row, whole))]

    def _at(self, row: Mapping[str, Any], whole: Example, length: int) -> Example:
        """As much of the document as leaves `length` positions in all; if that is nothing, the example's beginning."""
        tokenizer = self.chat.tokenizer
        ids = tokenizer.encode(Columns(row, self._config.columns).text("document"))
        example, keep = whole, len(ids)
        while (excess := len(example.ids) - length) > 0:
            keep -= -(-excess // self._copies)  # once more if the pieces do not merge as before
            beginning = tokenizer.decode(ids[: max(keep, 0)]).rstrip("\ufffd")  # of half a character
            if not beginning.strip():
                return whole.cut(length)
            example = self._example(self._read_with(row, beginning))
        return example


class ContinuationTask:
    """Plain texts, trained from the first token that has one before it to the end of the document."""

    facts: Mapping[str, Any] = {}

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self._columns, self._tokenizer = config.columns, tokenizer

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        text = Columns(row, self._columns).text("text")
        ids = [*self._tokenizer.begins, *self._tokenizer.encode(text), self._tokenizer.eos_id]
        return [causal(ids, [True] * len(ids))]


def open_chat(config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> ConversationTask:
    return ConversationTask(
        config, _chat(config, data, tokenizer, fallback="chatml"), lambda row: conversation(row, config.columns)
    )


def open_dialogue(config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> ConversationTask:
    def read(row: Mapping[str, Any]) -> Conversation:
        messages = alternating(Columns(row, config.columns).get("turns"))
        return conversation({"messages": messages}, {})

    return ConversationTask(config, _chat(config, data, tokenizer, fallback="plain"), read)


def open_asked(config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> ConversationTask:
    """Summarization and translation: one question about a column of the row, one column that answers it."""
    asked_of, answer = {"summarization": ("document", "summary"), "translation": ("source", "target")}[config.kind]
    languages = ("source_language", "target_language")
    known = [asked_of, *(languages if config.kind == "translation" else ())]
    if config.prompt is not None:
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(config.prompt) if name is not None]
        except ValueError as error:
            raise MegalmError(f"task.prompt cannot be filled in ({error}): write {{{{ and }}}} for braces") from None
        if wrong := sorted(set(named) - set(known)):
            raise MegalmError(f"task.prompt names {{{wrong[0]}}}: {config.kind} knows {', '.join(known)}")

    def read(row: Mapping[str, Any], document: str | None = None) -> Conversation:
        columns = Columns(row, config.columns)
        values = {name: columns.text(name) for name in (asked_of, answer)}
        if document is not None:
            values[asked_of] = document
        given = {name: columns.get(name) for name in languages}
        values |= {name: value for name, value in given.items() if isinstance(value, str)}
        usual = BETWEEN_LANGUAGES if all(given.values()) else PROMPTS[config.kind]
        try:
            asked = (config.prompt or usual).format_map(values)
        except KeyError as error:
            raise Refused(f"no column {error.args[0]}") from None
        said = {"user": asked, "assistant": values[answer]}
        return Conversation([{"role": role, "content": content} for role, content in said.items()])

    kind = SummaryTask if config.kind == "summarization" else ConversationTask
    return kind(config, _chat(config, data, tokenizer, fallback="plain"), read)


def open_continuation(
    config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int
) -> ContinuationTask:
    return ContinuationTask(config, tokenizer)


def _chat(config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, fallback: str) -> Chat:
    """The template that the config asks for. fallback: what `auto` is without the tokenizer's own and ChatML's tokens.

    Raises MegalmError if it cannot be had.
    """
    template = config.template
    if template == "auto":
        own = read_template(data.tokenizer)
        template = own if own is not None else "chatml" if not lacking(tokenizer, "chatml") else fallback
    elif template not in NAMED:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MegalmError(
                f"task.template {config.template} is neither {', '.join(NAMED)} nor auto nor a file that can be read "
                f"({error}): correct it"
            ) from None
    return Chat(tokenizer, template)
