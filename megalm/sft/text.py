"""Tasks whose answer is text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megalm.data.config import DataConfig
from megalm.data.examples import Example
from megalm.sft.config import TaskConfig
from megalm.sft.task import Refused, Task
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.chat import Chat, read_template


def causal(ids: Sequence[int], trained: Sequence[bool]) -> Example:
    """A text's n + 1 ids as n positions, each of which says the next id; trained: of each id, [n + 1]."""
    return Example(np.array(ids[:-1]), np.array(ids[1:]), np.array(trained[1:], np.uint8))


class ChatTask:
    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.facts: Mapping[str, Any] = {}

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        if "messages" not in row:
            raise Refused("no column messages")
        ids = self.chat.encode(row["messages"], reply=False)
        return [causal(ids, [True] * len(ids))]


def open_chat(config: TaskConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> Task:
    return ChatTask(Chat(tokenizer, read_template(data.tokenizer)))
