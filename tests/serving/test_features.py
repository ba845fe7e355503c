"""Calls, reasoning, log-probabilities, several choices and JSON of a schema, asked as the `openai` package asks."""

import asyncio
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from nemotron_dspark.config.run import DraftSection, ServeConfig
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.recipe import tiny
from nemotron_dspark.serving.listen import Server
from nemotron_dspark.serving.service import Served
from nemotron_dspark.serving.text import Spelling
from tests.chat.chat_templates import FUNCTION_TAGS, HERMES, NEMOTRON_3
from tests.serving.fake_decoder import SCRIPT, FakeDecoder
from tests.serving.test_server import HELLO, client_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def tool(**city):
    """A function of one text that is also what ``city`` says."""
    properties = {"city": {"type": "string"} | city}
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
def saying(request):
    """``saying(template, text)`` is a client of a server whose target has the template and says the text."""
    servers = []

    def serve(template, text):
        tokenizer = tiny.make_tokenizer([SCRIPT], 330)
        tokenizer.chat_template = template
        fake = FakeDecoder(tokenizer)
        fake.script, fake.stop = tokenizer.encode(text), tokenizer.eos_token_id
        servers.append(Server(Served("fake", frozenset(), fake, tokenizer, 330, 4096)).__enter__())
        return client_of(servers[-1])

    yield serve
    for server in servers:
        server.__exit__(None, None, None)


def test_a_call_is_made_answered_and_followed_up(saying):
    client = saying(HERMES, f"I look.\n{CALLED}")
    asked = {"model": "fake", "messages": HELLO, "tools": [WEATHER]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "get_weather",
        {"city": "Rome"},
    )
    history = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "18 C"}]
    again = client.chat.completions.create(model="fake", messages=history, tools=[WEATHER])
    assert again.usage.prompt_tokens > client.chat.completions.create(**asked).usage.prompt_tokens
    silent = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert (silent.finish_reason, silent.message.tool_calls) == ("stop", None)
    assert CALLED in silent.message.content
    refused = (
        {"parallel_tool_calls": False},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
    )
    for more in refused:
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked | more)


def test_a_call_in_a_stream_comes_whole_and_no_tag_is_shown(saying):
    client = saying(HERMES, f"I look.\n{CALLED}\n{CALLED}")
    chunks = list(client.chat.completions.create(model="fake", messages=HELLO, tools=[WEATHER], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "I look."
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (at, "get_weather", '{"city": "Rome"}') for at in (0, 1)
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_are_refused_where_the_template_knows_none(saying):
    client = saying(tiny.CHAT_TEMPLATE, "x")
    for asked in ({"tools": [WEATHER]}, {"messages": [*HELLO, {"role": "tool", "content": "x", "tool_call_id": "1"}]}):
        with pytest.raises(openai.BadRequestError, match="prints no calls"):
            client.chat.completions.create(**{"model": "fake", "messages": HELLO, **asked})


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_has_a_field_of_its_own_unless_it_is_asked_to_stay(saying, stream):
    client = saying(NEMOTRON_3, "Hm.\n</think>\n\nA state.")

    def ask(**more):
        answer = client.chat.completions.create(model="fake", messages=HELLO, stream=stream, extra_body=more)
        if not stream:
            message = answer.choices[0].message
            return message.content, getattr(message, "reasoning_content", None)
        deltas = [chunk.choices[0].delta for chunk in answer]
        found = [
            "".join(getattr(delta, field, None) or "" for delta in deltas) for field in ("content", "reasoning_content")
        ]
        return found[0], found[1] or None

    assert ask() == ("A state.", "Hm.")
    assert ask(separate_reasoning=False) == ("Hm.\n</think>\n\nA state.", None)
    # With reasoning off the prompt opens none; what the target then says is content.
    off = ask(chat_template_kwargs={"enable_thinking": False})
    assert off == ("Hm.\n</think>\n\nA state.", None)


def test_reasoning_in_the_history_goes_to_the_template(saying):
    client = saying(NEMOTRON_3, "x")
    long = {"role": "assistant", "content": "A state.", "reasoning_content": "Hm. " * 50}
    usages = [
        client.chat.completions.create(model="fake", messages=[*HELLO, answer]).usage.prompt_tokens
        for answer in (long, {"role": "assistant", "content": "A state."})
    ]
    assert usages[0] > usages[1]


@pytest.fixture(scope="module")
def draft(target):
    section = DraftSection(num_layers=1, block_size=4, taps=[0, 1], markov_rank=8)
    draft = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=0)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    return draft


@pytest.fixture(scope="module")
def drafting(target, draft):
    with Server(target, draft, ServeConfig(port=0, max_batch_size=4)) as server, client_of(server) as client:
        yield client


def test_logprobs_belong_to_the_tokens_of_the_text(drafting, target):
    asked = {"model": "tiny-hybrid", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    answer = drafting.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    assert len(told) == 20
    assert all(each.top_logprobs[0].token == each.token for each in told)  # greedy
    assert all(each.top_logprobs[0].logprob == each.logprob <= 0 for each in told)
    assert all(len(each.top_logprobs) == 3 for each in told)
    assert "".join(each.token for each in told if each.bytes) in (text := answer.choices[0].message.content) or text
    stream = list(drafting.chat.completions.create(**asked, logprobs=True, stream=True))
    streamed = [each for chunk in stream if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.token for each in streamed] == [each.token for each in told]
    # Not to the last bit: what the first request had read of the prompt is not read again.
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in told], abs=1e-5)
    plain = drafting.chat.completions.create(**asked)
    assert plain.choices[0].logprobs is None
    assert plain.choices[0].message.content == text


def test_logprobs_of_a_completion_have_the_older_shape(drafting):
    answer = drafting.completions.create(
        model="tiny-hybrid", prompt="The state", max_tokens=9, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 9
    assert all(len(top) == 2 for top in told.top_logprobs)
    assert told.text_offset[0] == 0
    assert told.text_offset == sorted(told.text_offset)
    assert told.text_offset[-1] <= len(choice.text)
    for bad in (True, 6, -1):
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            drafting.completions.create(model="tiny-hybrid", prompt="x", logprobs=bad)


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_differ_and_the_first_is_that_of_one(drafting, stream):
    asked = {"model": "tiny-hybrid", "messages": HELLO, "seed": 7, "max_tokens": 16}

    def texts(n):
        answer = drafting.chat.completions.create(
            **asked, n=n, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {})
        )
        if not stream:
            assert [choice.index for choice in answer.choices] == list(range(n))
            return [choice.message.content for choice in answer.choices], answer.usage
        found, usage = [""] * n, None
        for chunk in answer:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                found[choice.index] += choice.delta.content or ""
        return found, usage

    (one,), alone = texts(1)
    three, usage = texts(3)
    assert three[0] == one
    assert len(set(three)) == 3
    assert usage.prompt_tokens == alone.prompt_tokens
    assert usage.completion_tokens > alone.completion_tokens


def test_more_choices_than_there_is_room_for_are_refused_and_leave_nothing_behind(fake_server, fake):
    with client_of(fake_server) as client:
        with pytest.raises(openai.InternalServerError, match="full"):
            client.completions.create(model="fake", prompt="x", n=9, max_tokens=50)
        assert client.completions.create(model="fake", prompt="x", n=2, max_tokens=3).choices[1].text
    assert not fake.alive
    assert fake_server.engine.waiting == 0


class Point(BaseModel):
    colour: Literal["red", "green", "blue"]
    near: bool
    steps: list[Literal[1, 2, 3]]


def test_an_answer_keeps_its_schema_and_is_the_constrained_targets_own(drafting, target):
    """The client's own example of structured outputs, whatever a random target would rather say."""
    asked = {"model": "tiny-hybrid", "messages": HELLO, "max_tokens": 200}
    answer = drafting.chat.completions.parse(**asked, temperature=0, response_format=Point)
    assert isinstance(answer.choices[0].message.parsed, Point)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.speculative["rounds"] > 0
    undrafted = drafting.chat.completions.parse(
        **asked, temperature=0, response_format=Point, extra_body={"speculative": False}
    )
    assert undrafted.choices[0].message.content == answer.choices[0].message.content
    assert undrafted.usage.completion_tokens == answer.usage.completion_tokens
    sampled = drafting.chat.completions.parse(**asked, seed=1, n=4, response_format=Point)
    kept = [choice.message.parsed for choice in sampled.choices if choice.finish_reason == "stop"]
    assert len({point.model_dump_json() for point in kept}) > 1


def test_the_clients_helpers_for_streams_tools_and_async_work(drafting, saying):
    """As in the package's helpers.md: events of a stream, tools of pydantic models, the asynchronous client."""
    asked = {"model": "tiny-hybrid", "messages": [{"role": "developer", "content": "Be brief."}, *HELLO]}
    with drafting.chat.completions.stream(**asked, temperature=0, max_tokens=200, response_format=Point) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.parsed, Point)

    class GetWeather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(GetWeather)
    client = saying(HERMES, CALLED.replace("get_weather", "GetWeather"))
    call = client.chat.completions.parse(model="fake", messages=HELLO, tools=[tool]).choices[0].message.tool_calls[0]
    assert call.function.parsed_arguments == GetWeather(city="Rome")
    with client.chat.completions.stream(model="fake", messages=HELLO, tools=[tool]) as stream:
        assert "tool_calls.function.arguments.done" in {event.type for event in stream}

    async def ask():
        base_url = str(drafting.base_url)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
            answers = [client.chat.completions.create(**asked, seed=seed, max_tokens=5) for seed in range(3)]
            return await asyncio.gather(*answers)

    assert all(answer.usage.completion_tokens for answer in asyncio.run(ask()))
    raw = drafting.chat.completions.with_raw_response.create(**asked, max_tokens=2)
    assert raw.parse().object == "chat.completion"


class Paint(BaseModel):
    """Few words, so that a random target comes to an end."""

    colour: Literal["red", "green", "blue"]
    coats: Literal[1, 2, 3]


@pytest.mark.parametrize("template", [HERMES, FUNCTION_TAGS])
def test_a_demanded_call_is_made_whatever_the_target_would_say(target, draft, monkeypatch, template):
    monkeypatch.setattr(target.tokenizer, "chat_template", template)
    paint, other = openai.pydantic_function_tool(Paint), openai.pydantic_function_tool(Point)
    asked = {"model": "tiny-hybrid", "messages": HELLO, "max_tokens": 300, "tools": [other, paint]}
    named = {"tool_choice": {"type": "function", "function": {"name": "Paint"}}}
    with Server(target, draft, ServeConfig(port=0)) as server, client_of(server) as client:
        parse = client.chat.completions.parse
        greedy = parse(**asked, **named, temperature=0)
        undrafted = parse(**asked, **named, temperature=0, extra_body={"speculative": False})
        required = {"tool_choice": "required", "parallel_tool_calls": False}
        sampled = parse(**asked | {"tools": [paint]}, **required, n=2, seed=1)
    assert greedy.usage.speculative["rounds"] > 0
    for choice in (*greedy.choices, *undrafted.choices, *sampled.choices):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Paint)
    assert greedy.usage.completion_tokens == undrafted.usage.completion_tokens
    first, second = (each.choices[0].message.tool_calls[0].function for each in (greedy, undrafted))
    assert first.arguments == second.arguments


@pytest.mark.parametrize(
    ("more", "mention"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "not among tools"),
        ({"tool_choice": "required", "tools": []}, "not among tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "none that this server knows"),
        ({"tool_choice": "required", "tools": [tool(pattern="a")]}, "pattern of a text"),
        ({"tool_choice": "required", "tools": [tool(type="strin")]}, "cannot be kept exactly"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a b"}}]}, "a name holds"),
    ],
)
def test_a_call_that_cannot_be_demanded_is_refused(saying, more, mention):
    client = saying(FUNCTION_TAGS, "x")
    with pytest.raises(openai.BadRequestError, match=mention):
        client.chat.completions.create(**{"model": "fake", "messages": HELLO, "tools": [WEATHER], **more})


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}},
        {"type": "grammar"},
        7,
    ],
)
def test_a_schema_that_cannot_be_kept_exactly_is_refused(drafting, given):
    with pytest.raises(openai.BadRequestError) as caught:
        drafting.chat.completions.create(model="tiny-hybrid", messages=HELLO, response_format=given)
    assert caught.value.body["param"] == "response_format"


def test_json_begins_behind_the_reasoning(target, draft, monkeypatch):
    """A prompt that opens reasoning leaves it free; its end must come before the end of the answer."""
    tokenizer = target.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", NEMOTRON_3)
    closes = tokenizer.get_vocab()["</think>"]
    own = target.logits

    def soon(hidden):  # a target that likes to stop thinking
        logits = own(hidden)
        logits[..., closes] += 6.0
        return logits

    monkeypatch.setattr(target, "logits", soon)
    with Server(target, draft, ServeConfig(port=0)) as server, client_of(server) as client:
        answer = client.chat.completions.parse(
            model="tiny-hybrid", messages=HELLO, seed=3, max_tokens=400, response_format=Point
        )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(message.parsed, Point)


def test_rounds_tell_who_made_each_token(drafting, target, draft):
    asked = {"model": "tiny-hybrid", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    answer = drafting.chat.completions.create(**asked, extra_body={"return_rounds": True})
    rounds = answer.choices[0].rounds
    assert (rounds[0]["kept"], len(rounds[0]["tokens"])) == (0, 1)
    assert "".join(text or "" for each in rounds for text in each["tokens"]) == answer.choices[0].message.content
    ids = target.tokenizer(tiny_prompt(target), add_special_tokens=False)["input_ids"]
    decoded = Decoder(target, draft).generate(ids, Sampling(max_new_tokens=30))
    assert [each["kept"] for each in rounds[1:-1]] == decoded.survived[:-1]
    assert all(len(each["tokens"]) == each["kept"] + 1 for each in rounds[:-1])
    spelling = Spelling(target.tokenizer)
    refused = [
        [spelling.token(id_) for id_ in block[kept:]]
        for block, kept in zip(decoded.drafted, decoded.survived, strict=True)
    ]
    assert [each["refused"] for each in rounds[1:]] == refused
    chunks = drafting.chat.completions.create(**asked, stream=True, extra_body={"return_rounds": True})
    streamed = [each for chunk in chunks for each in getattr(chunk.choices[0], "rounds", None) or ()]
    assert streamed == rounds
    undrafted = drafting.chat.completions.create(**asked, extra_body={"return_rounds": True, "speculative": False})
    assert {each["kept"] for each in undrafted.choices[0].rounds} == {0}
    assert undrafted.choices[0].message.content == answer.choices[0].message.content
    assert not hasattr(undrafted.usage, "speculative")


def tiny_prompt(target):
    from nemotron_dspark.chat.format import Message, render

    return render(target.tokenizer, [Message(**message) for message in HELLO], generation_prompt=True)
