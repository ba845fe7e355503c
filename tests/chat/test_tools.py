"""Calls of functions, their results, reasoning and parts go through the target's template; a call is what it wrote."""

import json

import numpy as np
import pytest

from nemotron_dspark.chat.format import Message, RenderError, render
from nemotron_dspark.chat.mask import NotMaskable, tokenise
from nemotron_dspark.data.conversations import parse_conversation
from nemotron_dspark.recipe import tiny
from tests.chat.chat_templates import LLAMA3, NANO_V2, QWEN3, THINKING_TOOLS, TOOLS
from tests.chat.test_mask import spans

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def conversation(*, content="", reasoning=None, **row):
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    answer = {"role": "assistant", "content": "18 C."}
    for turn, text in zip((call, answer), reasoning or (), strict=False):
        turn["reasoning_content"] = text
    turns = [
        {"role": "user", "content": "Rome?"},
        call,
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        answer,
    ]
    return parse_conversation({"messages": turns, "tools": [WEATHER], **row}, 1)


def trained(tokenizer, found):
    return [span for sample in found.samples for span in spans(tokenizer, sample)]


@pytest.mark.parametrize("content", ["", "I look."])
def test_a_call_trains_as_the_target_wrote_it_and_a_result_does_not(make_tokenizer, content):
    tokenizer = make_tokenizer(TOOLS)
    found = tokenise(tokenizer, conversation(content=content), max_length=4096)
    call = content + "\n" * bool(content) + '<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>'
    assert trained(tokenizer, found) == [call, "18 C.<|im_end|>"]
    (sample,) = found.samples
    text = tokenizer.decode(sample.input_ids)
    assert json.dumps(WEATHER) in text  # the functions are in the prompt
    assert "<tool_response>sunny</tool_response>" in text


def test_reasoning_of_its_own_field_trains_behind_the_tag_of_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer(THINKING_TOOLS)
    found = tokenise(tokenizer, conversation(reasoning=("I ask.", "Good.")), max_length=4096)
    assert trained(tokenizer, found) == [
        'I ask.\n</think>\n\n<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>',
        "Good.\n</think>\n\n18 C.<|im_end|>",
    ]


@pytest.mark.parametrize("template", [QWEN3, NANO_V2])
def test_reasoning_is_put_between_tags_where_the_template_looks_for_them(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A state."}]
    apart = parse_conversation({"messages": [turns[0], turns[1] | {"reasoning_content": "Hm."}]}, 1)
    inside = parse_conversation(
        {"messages": [turns[0], turns[1] | {"content": "<think>\nHm.\n</think>\n\nA state."}]}, 1
    )
    found, expected = (tokenise(tokenizer, given, max_length=4096).samples[0] for given in (apart, inside))
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert np.array_equal(found.loss_mask, expected.loss_mask)


def test_what_the_template_would_leave_out_is_refused(make_tokenizer):
    with pytest.raises(NotMaskable, match="does not print tool calls"):
        tokenise(make_tokenizer(tiny.CHAT_TEMPLATE), conversation(), max_length=4096)
    with pytest.raises(RenderError, match="prints no reasoning"):
        tokenise(make_tokenizer(LLAMA3), conversation(reasoning=("I ask.",)), max_length=4096)
    silent = TOOLS.replace("+ message.content + '</tool_response>", "+ '</tool_response>")
    with pytest.raises(NotMaskable, match="does not print tool results"):
        tokenise(make_tokenizer(silent), conversation(), max_length=4096)


def test_parts_are_a_list_for_a_template_that_prints_one_and_lines_for_others(make_tokenizer):
    message = Message("user", "What?\nState?", parts=("What?", "State?"))
    assert "user\nWhat?State?<|im_end|>" in render(make_tokenizer(TOOLS), [message])
    assert "user\nWhat?\nState?<|im_end|>" in render(make_tokenizer(tiny.CHAT_TEMPLATE), [message])


def with_ids(tokenizer, *, answer="A state.", change=(), end=True):
    """A conversation whose answer a server says to have tokenised a character at a time."""
    question = {"role": "user", "content": "What?"}
    prompt = tokenizer(render(tokenizer, [Message(**question)], generation_prompt=True))["input_ids"]
    said = [index for letter in answer for index in tokenizer(letter)["input_ids"]]
    ids = {"token_ids": said + tokenizer("<|im_end|>")["input_ids"] * end, "prompt_token_ids": [*prompt, *change]}
    return (
        parse_conversation({"messages": [question, {"role": "assistant", "content": answer, **ids}]}, 1),
        prompt,
        said,
    )


@pytest.mark.parametrize("end", [True, False])
def test_the_ids_a_server_gave_are_those_that_train(make_tokenizer, end):
    tokenizer = make_tokenizer(tiny.CHAT_TEMPLATE)
    given, prompt, said = with_ids(tokenizer, end=end)
    found = tokenise(tokenizer, given, max_length=4096)
    (sample,) = found.samples
    assert sample.input_ids.tolist() == [*prompt, *said, *tokenizer("<|im_end|>")["input_ids"]]
    assert len(said) > len(tokenizer("A state.")["input_ids"])  # not what tokenising the text again gives
    assert sample.loss_mask.tolist() == [0] * len(prompt) + [1] * (len(said) + 1)
    assert found.retold == ()


def test_ids_after_another_prompt_are_not_used_and_counted(make_tokenizer):
    tokenizer = make_tokenizer(tiny.CHAT_TEMPLATE)
    given, prompt, _ = with_ids(tokenizer, change=(5,))
    found = tokenise(tokenizer, given, max_length=4096)
    assert found.retold == (1,)
    assert found.samples[0].input_ids.tolist() == [*prompt, *tokenizer("A state.<|im_end|>")["input_ids"]]
