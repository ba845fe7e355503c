"""Grammars of calls: what they allow is read back as the functions declare it, and nothing else is allowed."""

import pytest

from nemotron_dspark.chat.tool_calls import ToolCall, call_format, read_calls
from nemotron_dspark.recipe import tiny
from nemotron_dspark.serving.grammar import Grammars
from tests.chat.chat_templates import FUNCTION_TAGS, HERMES, TOOLCALL_LIST
from tests.serving.fake_decoder import SCRIPT

MOOD = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer"},
        "mood": {"$ref": "#/$defs/Mood"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Mood": MOOD},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ROME, NOW = ToolCall("weather", {"city": 'R "o"\nme <b>', "unit": "C", "mood": {"good": True}}), ToolCall("now", {})
ROME_JSON = r'{"name": "weather", "arguments": {"city": "R \"o\"\nme <b>", "unit": "C", "mood": {"good": true}}}'
NOW_JSON = '{"name": "now", "arguments": {}}'
ROME_TAGS = (
    '<function=weather>\n<parameter=city>\nR "o"\nme <b>\n</parameter>\n<parameter=unit>\nC\n</parameter>\n'
    '<parameter=mood>\n{"good": true}\n</parameter>\n</function>'
)
PRINTED = {
    HERMES: [f"<tool_call>\n{ROME_JSON}\n</tool_call>", f"<tool_call>\n{NOW_JSON}\n</tool_call>"],
    FUNCTION_TAGS: [
        f"<tool_call>\n{ROME_TAGS}\n</tool_call>",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ],
    TOOLCALL_LIST: [f"<TOOLCALL>[{ROME_JSON}]</TOOLCALL>", f"<TOOLCALL>[{NOW_JSON}]</TOOLCALL>"],
}


@pytest.fixture(scope="module", params=PRINTED)
def demanded(request):
    """What the template prints, how it is read back, and how much of a text may be written, and may it end then."""
    tokenizer = tiny.make_tokenizer([SCRIPT], 330)
    tokenizer.chat_template = request.param
    form = call_format(tokenizer)
    grammars = Grammars(tokenizer, 330, [tokenizer.eos_token_id])

    def read(text):
        return [
            call for each in text.split(form.opening)[1:] for call in read_calls(each.partition(form.closing)[0], TOOLS)
        ]

    def written(text, several, *, ends=False):
        ids = tokenizer.encode(text, add_special_tokens=False)
        rows = grammars.calls(TOOLS, form, several=several).forbidden(ids)
        may_end = [not row[tokenizer.eos_token_id] for row in rows]
        if ends:
            return len(tokenizer.decode(ids[: may_end.index(True)]))
        return tokenizer.decode(ids[: len(rows) - 1]), may_end[-1]

    return PRINTED[request.param], read, written


def test_calls_are_allowed_as_the_template_prints_them(demanded):
    (rome, now), read, written = demanded
    assert written(rome, False) == (rome, True)
    assert read(rome) == [ROME]
    both = f"{now}\n{rome}"
    assert written(both, True) == (both, True)
    assert read(both) == [NOW, ROME]
    assert written(both, False) == (now, True)


def test_several_calls_may_stand_in_one_list(demanded):
    (rome, now), read, written = demanded
    if rome.startswith("<TOOLCALL>"):
        both = now.replace("]", f", {ROME_JSON}]")
        assert written(both, True) == (both, True)
        assert read(both) == [NOW, ROME]
        assert written(both, False)[0] == now.partition("]")[0]


@pytest.mark.parametrize(
    ("was", "becomes"),
    [("weather", "whether"), ("true", "1"), ("mood", "good"), ("now", "never"), ('"C"', '"K"'), ("\nC\n", "\nK\n")],
)
def test_what_no_function_declares_is_not_allowed(demanded, was, becomes):
    printed, _, written = demanded
    for text in printed:
        other = text.replace(was, becomes)
        assert (written(other, False) == (other, True)) == (other == text)


def test_a_call_must_be_complete_before_the_end(demanded):
    (rome, _), _, written = demanded
    assert written(rome, True, ends=True) == len(rome)


def test_a_text_without_quotes_holds_nothing_that_would_end_it(demanded):
    (rome, _), _, written = demanded
    if "<parameter=" in rome:
        for end in ("</function>", "<parameter=", "</tool_call>"):
            other = rome.replace("me <b>", end)
            assert written(other, False)[0] == rome.partition("me <b>")[0] + end[:-1]
