"""Conversations from rows: messages as OpenAI writes them, ShareGPT's conversations, Alpaca's instructions.

What a row is, its columns say: `messages`, `conversations`, or `instruction` and `output`. All become OpenAI's form:
{"role": system, user, assistant or tool, "content": text, and what else a message has, for templates that read it}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.sft.task import Refused
from megalm.tokenizer.chat import THOUGHT

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Who may speak, under the names that are in use, and the name that templates know."""


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    """What the assistant may call, as JSON schemas."""


class Columns:
    """The row's values by what they are, whatever the data calls them."""

    def __init__(self, row: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """names: those of the data, by what they are; a dot leads into an object (`translation.de`)."""
        self._row, self._names = row, names

    def name(self, what: str) -> str:
        return self._names.get(what, what)

    def get(self, what: str) -> Any:
        """None where there is none."""
        name = self.name(what)
        value: Any = self._row
        if name in self._row:
            return self._row[name]
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def text(self, what: str) -> str:
        """Raises Refused if it is missing, no text or blank."""
        value = self.get(what)
        if value is None:
            raise Refused(f"no column {self.name(what)}")
        if not isinstance(value, str):
            raise Refused(f"{self.name(what)} is not text")
        if not value.strip():
            raise Refused(f"an empty {what}")
        return value


def conversation(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """The conversation that a row holds. names: of its columns, by what they are.

    Raises Refused for a row that is none, and for one in which the assistant says nothing, or nothing once.
    """
    columns = Columns(row, names)
    turns = columns.get("messages")
    if turns is None:
        turns = columns.get("conversations")
    if turns is not None:
        if not _is_list(turns):
            raise Refused("messages are not a list")
        messages = [_message(turn, names) for turn in turns]
    elif columns.get("instruction") is not None:
        messages = _alpaca(columns)
    else:
        raise Refused("no column messages, conversations or instruction")
    system = columns.get("system")
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Refused("no answer of the assistant")
    if any(not (message["content"].strip() or message.get("tool_calls")) for message in answers):
        raise Refused("an empty answer")
    return Conversation(messages, _tools(columns.get("tools")))


def alternating(turns: Any) -> list[dict[str, Any]]:
    """A dialogue as messages: texts, which the user begins, or objects that say who speaks.

    Raises Refused for anything else.
    """
    if not _is_list(turns):
        raise Refused("turns are not a list")
    if all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return [_message(turn, {}) for turn in turns]


def _alpaca(columns: Columns) -> list[dict[str, Any]]:
    instruction, given, output = columns.text("instruction"), columns.get("input"), columns.get("output")
    if not isinstance(output, str):
        raise Refused(f"no column {columns.name('output')}" if output is None else "the output is not text")
    earlier = columns.get("history") or []
    if not (_is_list(earlier) and all(_is_list(pair) and len(pair) == 2 for pair in earlier)):
        raise Refused("history is not a list of pairs")
    asked = instruction + (f"\n\n{given}" if isinstance(given, str) and given.strip() else "")
    pairs = [*earlier, (asked, output)]
    return [
        {"role": role, "content": said}
        for pair in pairs
        for role, said in zip(("user", "assistant"), map(_content, pair))
    ]


def _message(turn: Any, names: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise Refused("a message is not an object")
    columns = Columns(turn, names)

    def either(names: Sequence[str]) -> Any:
        return next((value for name in names if (value := columns.get(name)) is not None), None)

    said_by = either(_SPEAKER)
    if not isinstance(said_by, str) or said_by not in ROLES:
        raise Refused(f"a message of the role {said_by!r}")
    content = _content(either(_SAID))
    read = {columns.name(name) for name in (*_SPEAKER, *_SAID)}
    message = {key: value for key, value in turn.items() if value is not None and key not in read}
    message |= {"role": ROLES[said_by], "content": content}
    if said_by == "function_call":
        message |= {
            "content": "",
            "tool_calls": [{"type": "function", "function": _parsed(content, "a function call")}],
        }
    if calls := message.get("tool_calls"):
        if not _is_list(calls):
            raise Refused("tool calls are not a list")
        message["tool_calls"] = [_call(call) for call in calls]
    if message["role"] == "assistant" and not all(isinstance(message.get(name, ""), str) for name in THOUGHT):
        raise Refused("a thought that is not text")
    if message.get("weight", 1) not in (0, 1):
        raise Refused("a weight that is neither 0 nor 1")
    return message


_SPEAKER, _SAID = ("role", "from", "speaker"), ("content", "value", "text")
"""Of a message: who speaks, and what, under the names that are in use."""


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _content(value: Any) -> str:
    """Text, or OpenAI's list of parts of text."""
    if value is None or isinstance(value, str):
        return value or ""
    if _is_list(value) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise Refused("a message whose content is not text")


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates write as JSON; OpenAI gives them as text."""
    if not isinstance(call, Mapping):
        raise Refused("a tool call is not an object")
    function = call.get("function", call)
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _parsed(function["arguments"], "the arguments of a tool call")}
    return {**call, "function": function} if "function" in call else function


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        value = _parsed(value, "tools") if value.strip() else None
    if value is not None and not isinstance(value, list):
        raise Refused("tools are not a list")
    return value or None


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(f"{what} that is not JSON") from None
