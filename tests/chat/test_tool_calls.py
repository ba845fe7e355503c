"""Calls of functions are read back as the target's own template prints them."""

import pytest

from nemotron_dspark.chat.format import Message, render
from nemotron_dspark.chat.tool_calls import ToolCall, call_format, read_calls
from tests.chat.chat_templates import FUNCTION_TAGS, HERMES, LLAMA3, NEMOTRON_3, TOOLCALL_LIST, TOOLS

TEXT = {"type": "string"}
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"text": TEXT, "most": {}}}},
}


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        (HERMES, ("<tool_call>", "</tool_call>")),
        (FUNCTION_TAGS, ("<tool_call>", "</tool_call>")),
        (TOOLCALL_LIST, ("<TOOLCALL>", "</TOOLCALL>")),
        (TOOLS, None),  # a way nobody knows
        (NEMOTRON_3, None),  # prints none
        (LLAMA3, None),
    ],
)
def test_the_template_tells_how_calls_are_written(make_tokenizer, template, tags):
    found = call_format(make_tokenizer(template))
    assert (found.tags if found else None) == tags


@pytest.mark.parametrize("template", [HERMES, FUNCTION_TAGS, TOOLCALL_LIST])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"text": "3"}, {"text": "two\nlines <b>", "most": 3}, {"most": [1, {"a": None}], "text": ""}, {"most": "ünï"}],
)
def test_a_call_is_read_as_the_template_prints_it(make_tokenizer, template, arguments):
    tokenizer = make_tokenizer(template)
    opening, closing = call_format(tokenizer).tags
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    turns = [Message("user", "?"), Message("assistant", "", more={"tool_calls": [call, call]})]
    printed = render(tokenizer, turns, tools=[TOOL])
    found = [read_calls(each.partition(closing)[0], [TOOL]) for each in printed.split(opening)[1:]]
    assert found == [[ToolCall("find", arguments)]] * 2


@pytest.mark.parametrize("text", ["", "x", "[1]", '{"name": 1}', '{"name": "f", "arguments": 3}', "<function=f>x", "{"])
def test_what_is_no_call_is_not_taken_for_one(text):
    with pytest.raises(ValueError):
        read_calls(text, [])
