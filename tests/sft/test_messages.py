"""Rows of three families become the same messages; what says nothing is refused with a reason."""

import json
from typing import Any

import pytest

from megalm.sft.messages import alternating, conversation
from megalm.sft.task import Refused

EXPECTED = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?\n\nmore"},
    {"role": "assistant", "content": "yes"},
]
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "messages": ({"messages": EXPECTED, "id": 7}, {}),
    "messages under another name": ({"chat": EXPECTED}, {"messages": "chat"}),
    "parts": (
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in EXPECTED]},
        {},
    ),
    "sharegpt": (
        {
            "system": "be brief",
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in EXPECTED[1:]
            ],
        },
        {},
    ),
    "alpaca": (
        {"instruction": "and?", "input": "more", "output": "yes", "history": [["hi", "hello"]], "system": "be brief"},
        {},
    ),
    "alpaca under other names": (
        {"q": "and?\n\nmore", "a": {"text": "yes"}, "history": [["hi", "hello"]], "system": "be brief"},
        {"instruction": "q", "output": "a.text"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_become_the_same_messages(family: str) -> None:
    row, columns = FAMILIES[family]
    assert conversation(row, columns).messages == EXPECTED


def test_tools_and_their_calls() -> None:
    call = {"name": "weather", "arguments": {"city": "Ulm"}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    openai = {
        "tools": tools,
        "messages": [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": call | {"arguments": json.dumps(call["arguments"])}}],
            },
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "it rains"},
        ],
    }
    sharegpt = {
        "tools": json.dumps(tools),
        "conversations": [
            {"from": "human", "value": "?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "it rains"},
        ],
    }
    ours, theirs = conversation(openai, {}), conversation(sharegpt, {})
    assert ours == theirs
    assert ours.tools == tools and ours.messages[1]["tool_calls"][0]["function"] == call


USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "x"}


def calling(arguments: str) -> dict[str, Any]:
    return ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "no column messages, conversations or instruction"),
        ({"messages": "x"}, "messages are not a list"),
        ({"messages": ["x"]}, "a message is not an object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "a message of the role 'wizard'"),
        ({"messages": [USER]}, "no answer of the assistant"),
        ({"messages": []}, "no answer of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "an empty answer"),
        ({"messages": [USER, {"role": "assistant"}]}, "an empty answer"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message whose content is not text"),
        ({"instruction": "x", "output": ""}, "an empty answer"),
        ({"instruction": "x"}, "no column output"),
        ({"instruction": "", "output": "x"}, "an empty instruction"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools that is not JSON"),
        ({"messages": 5}, "messages are not a list"),
        ({"messages": [USER, {"role": ["user"], "content": "x"}]}, r"a message of the role \['user'\]"),
        ({"messages": [USER, ANSWER | {"tool_calls": True}]}, "tool calls are not a list"),
        ({"messages": [USER, ANSWER | {"tool_calls": {"name": "f"}}]}, "tool calls are not a list"),
        ({"messages": [USER, calling("[" * 2000)]}, "the arguments of a tool call that is not JSON"),
        ({"messages": [USER, ANSWER | {"thinking": ["x"]}]}, "a thought that is not text"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "a weight that is neither 0 nor 1"),
        ({"messages": [USER, ANSWER | {"weight": "0"}]}, "a weight that is neither 0 nor 1"),
        ({"messages": [USER, ANSWER | {"weight": [0]}]}, "a weight that is neither 0 nor 1"),
        ({"instruction": "x", "output": "x", "history": 5}, "history is not a list of pairs"),
        ({"instruction": "x", "output": "x", "history": ["ab"]}, "history is not a list of pairs"),
    ],
)
def test_what_says_nothing_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=f"^{reason}"):
        conversation(row, {})


def test_what_a_template_may_read_is_kept() -> None:
    given = {"thinking": "a", "reasoning": "b", "tool_plan": "c", "weight": 0, "reasoning_content": None}
    row = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "x", **given}]}
    kept = {key: value for key, value in given.items() if value is not None}
    assert conversation(row, {}).messages == [USER, ANSWER | kept]


def test_dialogues_alternate() -> None:
    assert [turn["role"] for turn in alternating(["a", "b", "c"])] == ["user", "assistant", "user"]
    assert alternating([{"speaker": "human", "text": "a"}]) == [{"role": "user", "content": "a"}]
    with pytest.raises(Refused, match="turns are not a list"):
        alternating("a b")
