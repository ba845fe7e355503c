"""The grammar of calls that a target must make: as its chat template prints them, with arguments as functions declare.

Written in llguidance's dialect of Lark. Each function's schema stands by itself there, so that its `$ref`s find their
`$defs`. What is allowed is what `read_calls` reads back.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemotron_dspark.chat.tool_calls import EXAMPLE, CallFormat
from nemotron_dspark.errors import InputError

SPACE = r"[ \n\r\t]{0,32}"  # between values, bounded: some targets would otherwise write nothing else until the end
# What a schema may say where each parameter is written by itself, and what one of a text may say there.
_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description"}
_TEXT = {"type", "title", "description", "default", "examples"}
_CLOSES = "\n</parameter>\n"


def grammar_of_calls(
    tools: Sequence[Mapping[str, Any]], form: CallFormat, spell: Callable[[str], str | None], *, several: bool
) -> str:
    """A call of one of ``tools``; with ``several``, one or more.

    Args:
        tools: as OpenAI's API describes them.
        form: how the target writes calls.
        spell: how a tag stands in a grammar if it is one token, None if it is text.

    Raises:
        InputError: the target writes calls in a way in which the functions' schemas cannot be kept.
    """
    functions = [tool["function"] for tool in tools]
    if form.example.lstrip().startswith("<function="):
        before, after = form.example.partition("<function=")[0], form.example.rpartition("</function>")[2]
        calls, another = [_tagged(each) for each in functions], ""
        others = "|".join(re.escape(tag).replace("/", r"\/") for tag in ("<parameter=", "</function>", *form.tags))
        rules = [rf"text[lazy]: /(.|\n)*<\/parameter>\n/ & ~/(.|\n)*({others})(.|\n)*/"]
    else:
        before, around, after = _json_example(form)
        calls, rules = [_json(each, around) for each in functions], []
        another = ' (", " call)*' if several and before.endswith("[") else ""
    opening, closing = (spell(tag) or _literal(tag) for tag in form.tags)
    again = " (SPACE? marked)*" if several else ""
    return "\n".join([
        "%llguidance {}",
        f"start: SPACE? marked{again}",
        r"SPACE: /[ \n\r\t]{1,8}/",
        f"marked: {opening} {_literal(before)} call{another} {_literal(after)} {closing}",
        f"call: {' | '.join(calls)}",
        *rules,
    ])  # fmt: skip


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _json_schema(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACE}}, ensure_ascii=False)


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the arguments; a function that declares none takes none."""
    declared = function.get("parameters")
    if declared is None or declared == {}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(declared, dict):
        raise _unkept(function, "they are no JSON schema")
    return {**declared, "type": "object"}


def _unkept(function: Mapping[str, Any], why: str) -> InputError:
    return InputError(
        f"The parameters of {function['name']} cannot be kept exactly: {why}.",
        'Correct them, or send tool_choice "auto".',
    )


def _json_example(form: CallFormat) -> tuple[str, tuple[str, str, str], str]:
    """What stands before calls; before a name, between it and the arguments, and behind these; and behind calls."""
    before, _, rest = form.example.partition(json.dumps(EXAMPLE.name))
    start = rest.find("{")
    try:
        found, end = json.JSONDecoder().raw_decode(rest, max(start, 0))
    except ValueError:
        found, end = None, 0
    if found != EXAMPLE.arguments or "{" not in before or "}" not in rest[end:]:
        what = "This target's chat template prints arguments in a way in which no call can be forced."
        raise InputError(what, 'Send tool_choice "auto".')
    own, behind = before.rindex("{"), rest.index("}", end) + 1
    return before[:own], (before[own:], rest[:start], rest[end:behind]), rest[behind:]


def _json(function: Mapping[str, Any], around: tuple[str, str, str]) -> str:
    head = f"{around[0]}{json.dumps(function['name'], ensure_ascii=False)}{around[1]}"
    return f"{_literal(head)} {_json_schema(_parameters(function))} {_literal(around[2])}"


def _tagged(function: Mapping[str, Any]) -> str:
    """A call whose parameters are written each between tags, in the order in which they are declared."""
    schema, name = _parameters(function), function["name"]
    if further := sorted(set(schema) - _PLAIN):
        raise _unkept(function, f"{further[0]} speaks of parameters that are written one by one here")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if (
        not isinstance(properties, dict)
        or not isinstance(required, list)
        or not all(key in properties for key in required)
    ):
        raise _unkept(function, "required and properties do not fit together")
    if not re.fullmatch(r"[^>\s]+", name) or not all(re.fullmatch(r"[^>\n]+", key) for key in properties):
        raise _unkept(function, "a name holds > or a line break")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = [_literal(f"<function={name}>\n")]
    for key, each in properties.items():
        if isinstance(each, dict) and each.get("type") == "string":
            value = _quoteless(function, each)
        else:
            value = f"{_json_schema(shared | (each if isinstance(each, dict) else {}))} {_literal(_CLOSES)}"
        optional = "" if key in required else "?"
        parts.append(f"({_literal(f'<parameter={key}>' + chr(10))} {value}){optional}")
    return " ".join([*parts, _literal("</function>")])


def _quoteless(function: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A text that is written as it is, and the end of its parameter."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return f"({' | '.join(_literal(str(value)) for value in values)}) {_literal(_CLOSES)}"
    if further := sorted(set(schema) - _TEXT):
        raise _unkept(function, f"{further[0]} of a text that is written without quotes")
    return "text"
