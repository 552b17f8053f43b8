"""Conversations as ids: through a chat template, the tokenizer's own where it has one.

A template is Jinja, as Hugging Face keeps it: chat_template.jinja, or chat_template in tokenizer_config.json. What it
writes between messages may be control tokens; what is inside messages never is, whatever is typed there. What the
assistant says in a template's {% generation %} block begins with a token of its own, as it does when a model answers.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer

CHATML = """{% if tools -%}
    {{ raise_exception("ChatML says nothing of tools, the template qwen does") }}
{%- endif %}
{% for message in messages -%}
    {% if message.tool_calls %}
        {{- raise_exception("ChatML says nothing of tool calls, the template qwen does") }}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}
            {{- message.content + "<|im_end|>" }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + "<|im_end|>" }}
    {%- endif %}
    {{- "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}"""
"""OpenAI's chat markup."""
LLAMA3 = """{{- bos_token }}
{%- if tools %}
    {{- raise_exception("Llama 3 says nothing of tools, the template qwen does") }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls or message.role == "tool" %}
        {{- raise_exception("Llama 3 says nothing of tool calls, the template qwen does") }}
    {%- endif %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}
            {{- message.content | trim + "<|eot_id|>" }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}"""
"""Meta's Llama 3."""
QWEN = """{%- set first = messages[0].content if messages[0].role == "system" else "" %}
{%- if tools %}
    {{- "<|im_start|>system\n" + (first + "\n\n" if first else "") }}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" + tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within " }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
    {{- "<args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- elif messages[0].role == "system" %}
    {{- "<|im_start|>system\n" + first + "<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\n" }}
        {%- generation %}
            {%- if message.reasoning_content %}
                {{- "<think>\n" + message.reasoning_content + "\n</think>\n\n" }}
            {%- endif %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {%- set function = call.function or call %}
                {{- ("\n" if message.content or not loop.first else "") + '<tool_call>\n{"name": "' + function.name }}
                {{- '", "arguments": ' }}
                {{- function.arguments if function.arguments is string else function.arguments | tojson }}
                {{- "}\n</tool_call>" }}
            {%- endfor %}
            {{- "<|im_end|>" }}
        {%- endgeneration %}
        {{- "\n" }}
    {%- elif message.role == "tool" %}
        {{- "<|im_start|>user" if loop.first or loop.previtem.role != "tool" else "" }}
        {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
        {{- "<|im_end|>\n" if loop.last or loop.nextitem.role != "tool" else "" }}
    {%- elif message.role != "system" or not loop.first %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}"""
"""ChatML with tools and reasoning, as Qwen 3 writes them, and no system message or thought that nobody gave."""
PLAIN = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- generation %}
            {{- message.content + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + "\n\n" }}
    {%- endif %}
{%- endfor %}"""
"""No markup: what is asked, an empty line, the answer, the end of a document."""
NAMED = {"chatml": CHATML, "llama3": LLAMA3, "qwen": QWEN, "plain": PLAIN}

_CONTENT = "\ufdd2x"
"""What an answer says when only what stands behind it is asked for."""
_MARK, _UNFINISHED = "\ufdd0", "\ufdd1 "
"""Not characters, and so in no text: behind the first letter of a typed control token, and where a message stops."""

Message = Mapping[str, Any]
"""role: system, user, assistant or tool; content: text; and what else a template reads (tool_calls, say)."""
THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message may bring what the assistant thought; of several the first one counts."""


def read_template(path: str | Path) -> str | None:
    """The chat template beside a tokenizer, which is a folder or a file in it; None if there is none.

    Raises MegalmError if it cannot be read.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if template.exists():
            return template.read_text(encoding="utf-8")
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
    except (OSError, ValueError) as error:
        raise MegalmError(f"the chat template beside {path} cannot be read ({error}): copy the folder again") from None
    if isinstance(found, list):  # several by name
        found = {each.get("name"): each.get("template") for each in found}.get("default")
    return found


def trained_template(blend: Mapping[str, Any]) -> str | None:
    """The chat template that a run was fine-tuned with, as far as the `blend` of its checkpoint tells: its text, or in
    checkpoints of earlier versions the hash of one of NAMED."""
    if text := blend.get("chat_template"):
        return str(text)
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in NAMED.values()}
    return by_hash.get(blend.get("template", ""))


def lacking(tokenizer: Tokenizer, template: str) -> list[str]:
    """Control tokens of one of NAMED that a tokenizer does not have."""
    return sorted(set(re.findall(r"<\|\w+\|>", NAMED[template])) - tokenizer.special_tokens.keys())


class Chat:
    """Messages -> ids."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """template: one of NAMED, or Jinja; by default ChatML.

        Raises MegalmError if it is not Jinja, if the tokenizer lacks the control tokens of a named one, or if its
        library gives a conversation other ids.
        """
        self.tokenizer = tokenizer
        if template is None and lacking(tokenizer, "chatml"):
            raise MegalmError(
                "the tokenizer has neither a chat template nor ChatML's control tokens <|im_start|> and <|im_end|>: "
                "put chat_template.jinja beside it, or let the model continue a text (without a chat)"
            )
        if template in NAMED and (missing := lacking(tokenizer, template)):
            raise MegalmError(
                f"the tokenizer lacks {', '.join(missing)}, which the chat template {template} writes: choose another "
                "template, or a tokenizer with these control tokens"
            )
        self.template = NAMED.get(template or "chatml", template or "")
        """Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _json
        try:
            self._template = environment.from_string(self.template)
        except TemplateError as error:
            raise MegalmError(f"the chat template is not Jinja ({error}): correct it, or remove it") from None
        self._marks_answers = bool(re.search(r"{%[-+]?\s*generation\b", self.template))
        self._controls = {token: i for token, i in tokenizer.special_tokens.items() if token}
        self._control = _any_of(self._controls)
        self._typed = _any_of(_broken(token, _MARK) for token in self._controls)
        by_id = {i: token for token, i in self._controls.items()}
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._ends = {name: by_id.get(i, "") if i is not None else "" for name, i in ends.items()}
        if template == "plain" and not self._ends["eos_token"]:
            raise MegalmError(
                "the chat template plain ends an answer with the tokenizer's end of a document, which is no special "
                "token there: mark it as special in tokenizer.json, or choose another template"
            )
        self._hold_against_library()

    def _hold_against_library(self) -> None:
        """Raise MegalmError if the tokenizer's library, with which an export is served, gives a conversation other
        ids."""
        asked = {"role": "user", "content": "a"}
        for messages in ([asked, {"role": "assistant", "content": "a"}, asked], [asked]):
            try:
                text = _Writing(self, messages, None).plain(reply=True)
            except MegalmError:
                continue
            theirs = self.tokenizer.encode_marked(text)
            if theirs not in (None, self.ids(text)):
                raise MegalmError(
                    "the tokenizers library does not read the chat template's control tokens as ids between texts, so "
                    "an export would be given other ids than it was trained on: set normalized and single_word of "
                    "these tokens to false in tokenizer.json, or choose another template"
                )
            return

    def encode(
        self, messages: Sequence[Message], *, reply: bool = True, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Ids of a conversation. reply: up to where the assistant's next message begins. tools: it may call.

        Raises MegalmError for what the template refuses (roles out of order, say).
        """
        writing = _Writing(self, messages, tools)
        return writing.ids(writing.text(len(messages), reply))[0]

    def render(self, messages: Sequence[Message], *, reply: bool = True, unfinished: bool = False) -> str:
        """A conversation as text for ids(), where control tokens that were typed are broken up by an invisible mark.

        reply: as of encode(). unfinished: up to where the last message, which is to be continued, has come.

        Raises MegalmError for what the template refuses (roles out of order, say).
        """
        given = [*map(dict, messages)]
        if unfinished:
            given[-1]["content"] += _UNFINISHED
        text = _Writing(self, given, None, _MARK).plain(reply and not unfinished)
        if unfinished:
            text, shown, behind = text.rpartition(_UNFINISHED.strip())
            if not shown:
                raise MegalmError("the chat template does not show the last message, which is to be continued: mend it")
            if not behind.startswith(" "):  # the template trims messages
                text = text.rstrip()
        return text

    def ids(self, text: str) -> list[int]:
        """Ids of what render() gave, and of what was written behind it."""
        parts = self._parts(text, lambda part: self._typed.sub(lambda match: match[0].replace(_MARK, "", 1), part))
        return [*chain.from_iterable(self.tokenizer.encode_sequence(parts))]

    def _parts(self, text: str, whole: Callable[[str], str]) -> list[str | int]:
        """A text as texts and control ids. whole: makes typed control tokens whole again, once the others are cut
        out."""
        parts: list[str | int] = []
        done = 0
        for match in self._control.finditer(text):
            parts += [whole(text[done : match.start()])] if match.start() > done else []
            parts.append(self._controls[match[0]])
            done = match.end()
        return parts + ([whole(text[done:])] if done < len(text) else [])

    def answers(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a whole conversation, and [start, stop) among them of each turn of the assistant, with its end.

        A turn is what the template writes in a {% generation %} block. Without such blocks it is what an assistant's
        message adds to what the template writes of those before it, as long as that stays as it was.

        Raises MegalmError as encode does; and Unmarked if the turns cannot be told.
        """
        writing = _Writing(self, messages, tools)
        text = writing.text(len(messages), reply=False)
        return writing.ids(text if self._marks_answers else writing.marked(text, messages))

    @property
    def ends(self) -> set[int]:
        """The control token that the template puts behind an assistant's message, if it does, in a set; none either if
        it takes neither a question with its answer nor these behind a system message."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENT}]
        for messages in (said, [{"role": "system", "content": "a"}, *said]):
            try:
                behind = _Writing(self, messages, None).plain(reply=False).rpartition(_CONTENT)[2]
            except MegalmError:
                continue
            end = self._control.search(behind)
            return {self._controls[end[0]]} if end else set()
        return set()


class Unmarked(MegalmError):
    """A template that does not tell the assistant's tokens from others."""


class _Writing:
    """One conversation as a template writes it."""

    def __init__(
        self, chat: Chat, messages: Sequence[Message], tools: Sequence[Any] | None, mark: str | None = None
    ) -> None:
        """mark: what breaks up typed control tokens; by default a character that was not typed."""
        self._chat = chat
        given = [*map(_with_thought, messages)], list(tools) if tools else None
        # A control token that was typed is broken up by a character that nobody typed, and made whole after the
        # split. Two others stand where an answer begins and ends.
        typed = set().union(*map(set, _strings(given)))
        unused = [c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in typed and c != mark]
        self._mark, self._begin, self._end = [*([mark] if mark else []), *unused][:3]
        self._messages, self._tools = self._broken(given)

    def _broken(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._chat._control.sub(lambda match: _broken(match[0], self._mark), value)
        if isinstance(value, Mapping):
            return {self._broken(key): self._broken(each) for key, each in value.items()}
        return [self._broken(each) for each in value] if isinstance(value, (list, tuple)) else value

    def text(self, count: int, reply: bool) -> str:
        """What the template makes of the first messages."""
        try:
            return self._chat._template.render(
                messages=self._messages[:count],
                tools=self._tools,
                documents=None,
                add_generation_prompt=reply,
                **self._chat._ends,
                **{_GENERATED: lambda caller: self._begin + caller() + self._end},
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise MegalmError(f"the chat template refuses these messages ({error}): change their roles") from None

    def marked(self, text: str, messages: Sequence[Message]) -> str:
        """`text` with marks around the assistant's turns, found by what each adds."""
        pieces, done = [], 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, behind = self.text(number, reply=True), self.text(number + 1, reply=False)
            if not (text.startswith(behind) and behind.startswith(before) and len(before) >= done):
                raise Unmarked(
                    "the chat template has no {% generation %} blocks and writes a message otherwise when others "
                    "follow, so the assistant's tokens cannot be told: mark them in the template, take task.template "
                    "chatml, llama3 or qwen, or set task.train_on to all"
                )
            start, stop = len(before), len(behind)
            # What follows the token that ends the turn is not the assistant's.
            ends = [match.end() for match in self._chat._control.finditer(text, start, stop)]
            if ends and not text[ends[-1] : stop].strip():
                stop = ends[-1]
            pieces += [text[done:start], self._begin, text[start:stop], self._end]
            done = stop
        return "".join([*pieces, text[done:]])

    def ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text with marks, and where the marked turns are."""
        parts: list[str | int] = []
        marks: dict[str, list[int]] = {self._begin: [], self._end: []}  # how many parts stand before each
        for piece in re.split(f"([{self._begin}{self._end}])", text):
            if piece in marks:
                marks[piece].append(len(parts))
            else:
                parts += self._chat._parts(piece, lambda text: text.replace(self._mark, ""))
        encoded = self._chat.tokenizer.encode_sequence(parts)
        places = [0, *accumulate(map(len, encoded))]
        starts, stops = ([places[before] for before in marks[mark]] for mark in (self._begin, self._end))
        return [*chain.from_iterable(encoded)], [*zip(starts, stops, strict=True)]

    def plain(self, reply: bool) -> str:
        """All of it, without marks of the assistant's turns."""
        return re.sub(f"[{self._begin}{self._end}]", "", self.text(len(self._messages), reply))


_GENERATED = "_generated"


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: hands what is between them to a variable of the rendering."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.Name(_GENERATED, "load"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


def _with_thought(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to templates: without what is None, and with its thought as
    reasoning_content, and as thinking, which gpt-oss's and LFM2's read, where that was not given too."""
    given = {key: value for key, value in message.items() if value is not None}
    thought = next((given[name] for name in THOUGHT if name in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}


def _strings(value: Any) -> list[str]:
    """Every string in nested mappings and lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for each in pair for text in _strings(each)]
    return [text for each in value for text in _strings(each)] if isinstance(value, (list, tuple)) else []


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _broken(control: str, mark: str) -> str:
    return control[0] + mark + control[1:]


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers' templates expect it, unlike Jinja's own: nothing is escaped for HTML."""
    # Escaped, the mark in a broken control token could not be taken out again.
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return text if not ensure_ascii else re.sub(r"[^\x00-\x7f\ufdd0-\ufdef]", lambda c: json.dumps(c[0])[1:-1], text)
