"""Conversations as ids: through the tokenizer's own chat template where it has one, else as ChatML.

A template is Jinja, as Hugging Face keeps it: chat_template.jinja, or chat_template in tokenizer_config.json. What it
writes between messages may be control tokens; what is inside messages never is, whatever is typed there.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer

CHATML = """{% for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

Message = Mapping[str, str]
"""role: system, user or assistant; content: text."""

MARK, END = "\ufdd0", "\ufdd1 "
"""Not characters, and so in no text: behind the first letter of a typed control token, and where a message stops."""


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


class Chat:
    """Messages -> ids."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """template: Jinja; by default ChatML.

        Raises MegalmError if it is not Jinja, or if the tokenizer lacks the control tokens of ChatML.
        """
        self.tokenizer = tokenizer
        if template is None and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys():
            raise MegalmError(
                "the tokenizer has neither a chat template nor ChatML's control tokens <|im_start|> and <|im_end|>: "
                "put chat_template.jinja beside it, or let the model continue a text (without a chat)"
            )
        self.template = CHATML if template is None else template
        self._names = {token: i for token, i in tokenizer.special_tokens.items() if token}
        self._control = _any_of(self._names)
        self._typed = _any_of(map(_broken, self._names))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(self.template)
        except TemplateError as error:
            raise MegalmError(f"the chat template is not Jinja ({error}): correct it, or remove it") from None

    def encode(self, messages: Sequence[Message], *, reply: bool = True) -> list[int]:
        """Ids of a conversation. reply: up to where the assistant's next message begins.

        Raises MegalmError for what the template refuses (roles out of order, say).
        """
        return self.ids(self.render(messages, reply=reply))

    def render(self, messages: Sequence[Message], *, reply: bool = True, unfinished: bool = False) -> str:
        """A conversation as text for ids(), where control tokens that were typed are broken up by an invisible mark.

        reply: as of encode(). unfinished: up to where the last message, which is to be continued, has come.

        Raises MegalmError for what the template refuses (roles out of order, say).
        """
        contents = [self._control.sub(lambda match: _broken(match[0]), message["content"]) for message in messages]
        if unfinished:
            contents[-1] += END
        specials = {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}
        by_id = {i: token for token, i in self._names.items()}
        try:
            text = self._template.render(
                messages=[{**message, "content": content} for message, content in zip(messages, contents)],
                add_generation_prompt=reply and not unfinished,
                **{name: by_id.get(i, "") if i is not None else "" for name, i in specials.items()},
            )
        except (TemplateError, TypeError) as error:
            raise MegalmError(f"the chat template refuses these messages ({error}): change their roles") from None
        if unfinished:
            text, shown, behind = text.rpartition(END.strip())
            if not shown:
                raise MegalmError("the chat template does not show the last message, which is to be continued: mend it")
            if not behind.startswith(" "):  # the template trims messages
                text = text.rstrip()
        return text

    def ids(self, text: str) -> list[int]:
        """Ids of what render() gave, and of what was written behind it."""
        ids: list[int] = []
        start = 0
        for match in self._control.finditer(text):
            ids += self._text(text[start : match.start()])
            ids.append(self._names[match[0]])
            start = match.end()
        return ids + self._text(text[start:])

    def _text(self, text: str) -> list[int]:
        whole = self._typed.sub(lambda match: match[0].replace(MARK, "", 1), text)
        return self.tokenizer.encode(whole) if whole else []

    @property
    def ends(self) -> set[int]:
        """The control token that the template puts behind an assistant's message, if it does, in a set."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
        before = self.encode(said[:1])
        behind = self.encode([said[0], {"role": "assistant", "content": "a"}], reply=False)[len(before) :]
        controls = set(self.tokenizer.special_tokens.values())
        return set([i for i in behind if i in controls][:1])


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _broken(control: str) -> str:
    return control[0] + MARK + control[1:]


def _refuse(message: str) -> None:
    raise TemplateError(message)
