"""Calls of functions as targets write them, read back; which way a target writes is found by its chat template.

Three ways share two pairs of tags: `<tool_call>` around a JSON object (Qwen 2.5 and 3, Granite 4, Hermes) or around
`<function=name><parameter=key>` (Nemotron 3, Qwen 3.5 and Coder), and `<TOOLCALL>` around a JSON list (Nemotron Nano
v2, Llama-Nemotron). A template that prints a call in one of them, such that reading gives the same call, is understood.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemotron_dspark.chat.format import Message, RenderError, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAGS = (("<tool_call>", "</tool_call>"), ("<TOOLCALL>", "</TOOLCALL>"))
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>|$)\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)\s*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any]


EXAMPLE = ToolCall("get_weather", {"city": "New York", "days": 3})


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How a target writes calls: between which tags, and what stands there of `EXAMPLE`."""

    opening: str
    closing: str
    example: str

    @property
    def tags(self) -> tuple[str, str]:
        return self.opening, self.closing


def call_format(tokenizer: "PreTrainedTokenizerBase") -> CallFormat | None:
    """How this tokenizer's template prints calls, if `read_calls` understands it; None if not."""
    text = {"type": "string"}
    parameters = {"type": "object", "properties": {"city": text, "days": {"type": "integer"}}, "required": ["city"]}
    function = {"name": EXAMPLE.name, "description": "The weather.", "parameters": parameters}
    tool = {"type": "function", "function": function}
    call = {"name": EXAMPLE.name, "arguments": dict(EXAMPLE.arguments)}
    turns = (
        Message("user", "What is the weather?"),
        Message("assistant", "", more={"tool_calls": [{"id": "call00001", "type": "function", "function": call}]}),
    )
    try:
        offered = render(tokenizer, turns[:1], tools=[tool])
        printed = render(tokenizer, turns, tools=[tool])
    except RenderError:
        return None
    if EXAMPLE.name not in offered:
        return None
    printed = printed[len(offered) :] if printed.startswith(offered) else printed
    for opening, closing in _TAGS:
        inner = printed.rpartition(opening)[2].partition(closing)
        if opening in printed and inner[1]:
            try:
                found = read_calls(inner[0], [tool])
            except ValueError:
                continue
            if found == [EXAMPLE]:
                return CallFormat(opening, closing, inner[0])
    return None


def read_calls(inner: str, tools: Sequence[Any]) -> list[ToolCall]:
    """The calls in what a target wrote between its tags; ``tools`` tell which parameters are texts.

    Raises:
        ValueError: it is no call.
    """
    if inner.lstrip().startswith("<function="):
        return _tagged(inner, tools)
    value = json.loads(inner)
    return [_call(each) for each in (value if isinstance(value, list) else [value])]


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no object with a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return ToolCall(value["name"], arguments)


def _tagged(inner: str, tools: Sequence[Any]) -> list[ToolCall]:
    calls, at = [], 0
    while at < len(inner):
        found = _FUNCTION.match(inner, at)
        if found is None:
            raise ValueError("text beside a function")
        name, body = found.groups()
        types, arguments, within = _types(name, tools), {}, 0
        while within < len(body.rstrip()):
            parameter = _PARAMETER.match(body, within)
            if parameter is None:
                raise ValueError("text beside a parameter")
            key, value = parameter.groups()
            arguments[key] = value if types.get(key) == "string" else _value(value)
            within = parameter.end()
        calls.append(ToolCall(name, arguments))
        at = found.end()
    return calls


def _value(text: str) -> Any:
    """A parameter that is not declared a text: JSON if it is some, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)  # as templates print Python's


def _types(name: str, tools: Sequence[Any]) -> dict[str, Any]:
    """The declared types of the parameters of function ``name``."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            if isinstance(properties, dict):
                return {key: value.get("type") for key, value in properties.items() if isinstance(value, dict)}
    return {}
