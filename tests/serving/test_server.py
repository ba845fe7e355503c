"""The server as clients see it: the real `openai` package, and raw HTTP where that would not send such a thing."""

import concurrent.futures
import json
import socket
import threading
import time

import httpx
import openai
import pytest

from nemotron_dspark.chat.format import Message, render_prompt
from nemotron_dspark.chat.mask import tokenise
from nemotron_dspark.config import load_config
from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.data.conversations import read
from nemotron_dspark.data.regenerate import regenerate
from nemotron_dspark.decoding.decoder import Decoder
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.engines.clients import connect
from nemotron_dspark.errors import InputError
from nemotron_dspark.serving import listen
from nemotron_dspark.serving.listen import Server
from nemotron_dspark.serving.service import Served
from nemotron_dspark.serving.text import Spelling
from tests.serving.fake_decoder import FakeDecoder

WAIT = 20  # seconds after which a test gives up; nothing depends on it otherwise
HELLO = [{"role": "user", "content": "What does a hybrid model keep?"}]


def client_of(server, **options):
    return openai.OpenAI(base_url=server.base_url, api_key="-", max_retries=0, timeout=WAIT, **options)


def root(server):
    return server.base_url.removesuffix("/v1")


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.01)


def counters(server):
    """The samples of /metrics by name with labels."""
    lines = httpx.get(root(server) + "/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


@pytest.fixture(scope="module")
def idle_server(serve_tokenizer):
    """A server without a model that tests may share."""
    served = Served("fake", frozenset({"org/fake"}), FakeDecoder(serve_tokenizer), serve_tokenizer, 330, 4096)
    with Server(served) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def expected(target, sampling, thinking=None):
    """What the decoder alone answers to HELLO."""
    ids = render_prompt(target.tokenizer, [Message(**message) for message in HELLO], thinking)
    generation = Decoder(target).generate(ids, sampling)
    kept = generation.tokens[:-1] if generation.finished == "stop" else generation.tokens
    return len(ids), generation, Spelling(target.tokenizer).decode(kept)


def test_chat_answers_what_the_decoder_decodes(client, server, target):
    answer = client.chat.completions.create(model=server.model_id, messages=HELLO, temperature=0, max_tokens=40)
    prompt, generation, text = expected(target, Sampling(max_new_tokens=40))
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == generation.finished
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(generation.tokens))
    assert answer.usage.total_tokens == prompt + len(generation.tokens)
    assert answer.model == server.model_id == "tiny-hybrid"


def test_a_streamed_chat_is_the_same_text_and_ends_with_usage(client, server, target):
    stream = client.chat.completions.create(
        model=server.model_id,
        messages=HELLO,
        temperature=0,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    prompt, generation, text = expected(target, Sampling(max_new_tokens=40))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == text
    assert len([delta for delta in deltas if delta]) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == generation.finished
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (prompt, len(generation.tokens))
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_completions_take_text_and_ids(client, server, target, stream):
    ids = target.tokenizer.encode("The state of")
    texts = []
    for prompt in ("The state of", ["The state of"], ids, [ids]):
        answer = client.completions.create(
            model=server.model_id, prompt=prompt, temperature=0, max_tokens=12, stream=stream
        )
        chunks = list(answer) if stream else [answer]
        texts.append("".join(chunk.choices[0].text for chunk in chunks))
    generation = Decoder(target).generate(ids, Sampling(max_new_tokens=12))
    assert generation.finished == "length"
    assert set(texts) == {Spelling(target.tokenizer).decode(generation.tokens)}


def test_token_ids_are_given_to_who_asks_for_them(client, server, target):
    settings = {"model": server.model_id, "temperature": 0, "max_tokens": 12}
    asked = {"extra_body": {"return_token_ids": True}}
    answer = client.chat.completions.create(messages=HELLO, **settings, **asked)
    _, generation, _ = expected(target, Sampling(max_new_tokens=12))
    assert answer.choices[0].token_ids == generation.tokens
    assert answer.prompt_token_ids == render_prompt(target.tokenizer, [Message(**message) for message in HELLO])
    text = client.completions.create(prompt=[7, 8, 9], **settings, **asked).choices[0]
    assert (text.prompt_token_ids, len(text.token_ids)) == ([7, 8, 9], 12)
    assert not hasattr(client.chat.completions.create(messages=HELLO, **settings), "prompt_token_ids")
    with pytest.raises(openai.BadRequestError, match="return_token_ids is not supported in a stream"):
        client.chat.completions.create(messages=HELLO, stream=True, **settings, **asked)


def test_what_trains_is_what_this_server_said(server, target, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"State {n}?", "And then?"]}) + "\n" for n in range(3)))
    report = regenerate(prompts, out, base_url=server.base_url, max_tokens=16, temperature=1.0)
    found = [tokenise(target.tokenizer, conversation, max_length=999) for conversation in read(out)]
    assert sum(sample.loss_tokens for each in found for sample in each.samples) == report.tokens
    assert all(each.retold == () for each in found)


def test_a_seed_makes_the_answer_reproducible(client, server):
    def ask(seed, temperature=1.0):
        answer = client.chat.completions.create(
            model=server.model_id, messages=HELLO, seed=seed, max_tokens=24, temperature=temperature
        )
        return answer.choices[0].message.content

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(4)}) > 1
    default = client.chat.completions.create(model=server.model_id, messages=HELLO, seed=7, max_tokens=24)
    assert default.choices[0].message.content == ask(7)  # the temperature is 1 when nobody says


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_off_wherever_tokens_end(client, server, target, stream):
    _, _, text = expected(target, Sampling(max_new_tokens=60))
    stop = text[7:12]
    answer = client.chat.completions.create(
        model=server.model_id, messages=HELLO, temperature=0, max_tokens=60, stop=[stop, "never said"], stream=stream
    )
    if stream:
        chunks = list(answer)
        shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        shown, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert shown == text[: text.index(stop)]
    assert reason == "stop"


@pytest.mark.parametrize("how", [{}, {"stream": True, "stream_options": {"include_usage": True}}, {"stop": "\0"}])
def test_a_stop_token_ends_the_answer_and_is_not_in_it(client, server, target, monkeypatch, how):
    _, before, _ = expected(target, Sampling(max_new_tokens=30))
    monkeypatch.setattr(target, "stop_ids", frozenset({before.tokens[20]}))
    _, generation, text = expected(target, Sampling(max_new_tokens=30))
    assert generation.finished == "stop"
    answer = client.chat.completions.create(model=server.model_id, messages=HELLO, temperature=0, max_tokens=30, **how)
    if "stream" in how:
        *chunks, last = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        reason, usage = chunks[-1].choices[0].finish_reason, last.usage
    else:
        assert answer.choices[0].message.content == text
        reason, usage = answer.choices[0].finish_reason, answer.usage
    assert reason == "stop"
    assert usage.completion_tokens == len(generation.tokens)  # the stop token was generated, too


def test_parts_of_text_are_joined(client, server):
    parts = [{"type": "text", "text": "What does a "}, {"type": "text", "text": "hybrid model keep?"}]
    answers = [
        client.chat.completions.create(
            model=server.model_id, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8
        )
        for content in (HELLO[0]["content"], parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_two_clients_are_answered_in_shared_rounds(fake_server, fake):
    fake.go.clear()
    with client_of(fake_server) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        asking = [
            pool.submit(client.completions.create, model="fake", prompt="x", max_tokens=60, stream=False)
            for _ in range(2)
        ]
        until(lambda: fake_server.engine.active + fake_server.engine.waiting == 2)
        fake.go.set()
        texts = {future.result(WAIT).choices[0].text for future in asking}
    assert len(texts) == 1
    assert max(fake.together) == 2
    assert counters(fake_server)["nds_round_requests_sum"] > counters(fake_server)["nds_rounds_total"]


def test_two_streams_of_a_real_target_share_rounds_and_keep_their_text(server, target):
    """Answers this short may be over before the second request is read, so they are asked until two meet."""
    start = threading.Barrier(2)

    def ask(seed):
        with client_of(server) as client:
            start.wait(WAIT)
            stream = client.chat.completions.create(
                model=server.model_id, messages=HELLO, seed=seed, max_tokens=120, temperature=0.8, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    wanted = [expected(target, Sampling(temperature=0.8, seed=seed, max_new_tokens=120))[2] for seed in (1, 2)]
    for _ in range(20):
        before = counters(server)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            assert list(pool.map(ask, (1, 2))) == wanted
        after = counters(server)
        rounds, requests = (after[key] - before[key] for key in ("nds_rounds_total", "nds_round_requests_sum"))
        if requests > rounds:
            return
    pytest.fail("no round ever held both requests")


def post_and_stay(server, **body):
    """A request on a socket of its own; closing the socket is leaving."""
    host, port = root(server).removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=WAIT)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_in_the_batch_and_in_the_queue(fake_server, fake, stream):
    engine = fake_server.engine
    fake.go.clear()
    decoded = [post_and_stay(fake_server, prompt="x", max_tokens=2000, stream=stream) for _ in range(2)]
    until(lambda: engine.active + engine.waiting == 2)
    queued = post_and_stay(fake_server, prompt="x", max_tokens=2000, stream=stream)
    until(lambda: engine.active + engine.waiting == 3)
    queued.close()
    until(lambda: engine.active + engine.waiting == 2)
    for connection in decoded:
        connection.close()
    cancelled = 'nds_requests_total{endpoint="/v1/completions",outcome="cancelled"}'
    until(lambda: counters(fake_server).get(cancelled) == 3)
    fake.go.set()
    until(lambda: engine.active == 0)
    assert not fake.alive
    assert counters(fake_server)["nds_generated_tokens_total"] < 100  # none of them was decoded to its end


def test_a_client_that_stops_reading_a_stream_frees_its_place(server):
    with client_of(server) as client:
        stream = client.chat.completions.create(model=server.model_id, messages=HELLO, max_tokens=2000, stream=True)
        next(stream)
        stream.close()
    until(lambda: server.engine.active == 0)


def test_a_full_queue_is_503_and_says_when_to_come_back(fake_server, fake):
    fake.go.clear()
    held = [post_and_stay(fake_server, prompt="x", max_tokens=3) for _ in range(3)]
    until(lambda: fake_server.engine.active + fake_server.engine.waiting == 3)
    answer = httpx.post(fake_server.base_url + "/completions", json={"prompt": "x"})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full"
    health = httpx.get(root(fake_server) + "/health").json()
    assert health["active"] + health["waiting"] == 3
    fake.go.set()
    for connection in held:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
    with client_of(fake_server) as client:
        assert client.completions.create(model="fake", prompt="x", max_tokens=3).choices[0].text


def test_a_failure_is_500_and_the_next_request_is_answered(fake_server, fake):
    with client_of(fake_server) as client:
        fake.fail_step = RuntimeError("broken")
        with pytest.raises(openai.InternalServerError, match="broken"):
            client.completions.create(model="fake", prompt="x", max_tokens=9)
        fake.fail_step = RuntimeError("broken")
        with pytest.raises(openai.APIError, match="broken"):
            list(client.completions.create(model="fake", prompt="x", max_tokens=9, stream=True))
        assert client.completions.create(model="fake", prompt="x", max_tokens=9).choices[0].finish_reason == "length"


def test_stopping_tells_the_clients_that_are_cut_off(fake_served, fake, monkeypatch):
    monkeypatch.setattr(listen, "GRACE", 0)
    fake.pause = 0.05
    with Server(fake_served) as running, client_of(running) as client:
        stream = client.completions.create(model="fake", prompt="x", max_tokens=2000, stream=True)
        next(stream)
        running.__exit__(None, None, None)
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(model="fake", prompt="x")


def test_a_dead_engine_is_unhealthy(fake_server, fake):
    assert httpx.get(root(fake_server) + "/health").status_code == 200
    fake.fail_step = SystemExit()
    with client_of(fake_server) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="fake", prompt="x", max_tokens=9)
    assert httpx.get(root(fake_server) + "/health").status_code == 503
    with client_of(fake_server) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="fake", prompt="x", max_tokens=9)


BAD = {
    "a word": (b"hello", "not valid JSON"),
    "cut off": (b'{"prompt": "x"', "not valid JSON"),
    "empty": (b"", "empty"),
    "a list": (b"[1, 2]", "no JSON object"),
    "not utf-8": (b'{"prompt": "\xff"}', "body"),
    "a deep one": (b"[" * 200_000, "body"),
    "no prompt": (b"{}", "prompt is missing"),
    "a wrong type": (b'{"prompt": "x", "temperature": "hot"}', "temperature = 'hot'"),
    "too cold": (b'{"prompt": "x", "temperature": -1}', "temperature"),
    "not a number": (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    "top_p": (b'{"prompt": "x", "top_p": 0}', "top_p"),
    "no tokens": (b'{"prompt": "x", "max_tokens": 0}', "max_tokens"),
    "seed": (b'{"prompt": "x", "seed": 99999999999999999999}', "seed"),
    "many stops": (b'{"prompt": "x", "stop": ["1", "2", "3", "4", "5"]}', "stop"),
    "empty stop": (b'{"prompt": "x", "stop": ""}', "stop"),
    "empty prompt": (b'{"prompt": ""}', "prompt"),
    "prompts": (b'{"prompt": ["a", "b"]}', "2 prompts"),
    "half a character": (b'{"prompt": "x\\ud800"}', "half of a surrogate pair"),
    "a foreign id": (b'{"prompt": [1, 330]}', "0 to 329"),
    "true is no id": (b'{"prompt": [true]}', "prompt"),
    "n": (b'{"prompt": "x", "n": 0}', "n = 0"),
    "logprobs": (b'{"prompt": "x", "logprobs": 9}', "logprobs = 9"),
    "deep": (b'{"prompt": "x", "temperature": ' + b"[" * 800 + b"]" * 800 + b"}", "temperature = [[[...]]] is not"),
    "echo": (b'{"prompt": "x", "echo": true}', "echo is not supported"),
    "top_k": (b'{"prompt": "x", "top_k": 5}', "top_k is not supported"),
    "long": (json.dumps({"prompt": [40] * 4096}).encode(), "4096 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_400_with_what_and_do(idle_server, case):
    body, mention = BAD[case]
    rejected = 'nds_requests_total{endpoint="/v1/completions",outcome="rejected"}'
    before = counters(idle_server).get(rejected, 0)
    answer = httpx.post(
        idle_server.base_url + "/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert mention in error["message"]
    assert error["message"].count(". ") == 1  # what, and what to do
    assert error["message"].endswith(".")
    assert counters(idle_server)[rejected] == before + 1


@pytest.mark.parametrize(
    ("prompt", "asked", "given"), [([40], 3000, 2048), ([40] * 4000, 500, 96), ([40] * 4000, None, 96)]
)
def test_an_answer_is_at_most_the_servers_limit_and_what_the_model_holds(idle_server, prompt, asked, given):
    with client_of(idle_server) as client:
        answer = client.completions.create(model="fake", prompt=prompt, max_tokens=asked)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (given, "length")


BAD_CHATS = {
    "no messages": ({"messages": []}, "messages"),
    "a role": ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text parts"),
    "a nameless tool": ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools.0"),
    "bad calls": ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "tool_calls is not a list of calls"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "switch": ({"messages": HELLO, "chat_template_kwargs": {"colour": 1}}, "colour is not supported"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_bad_chats_are_400_for_the_openai_client(client, server, case):
    body, mention = BAD_CHATS[case]
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert mention in caught.value.body["message"]
    assert caught.value.body["message"].count(". ") == 1


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"messages": [{"role": "user", "content": "x\ud800"}]}, "messages.0 holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}, "surrogate pair"),
        ({"chat_template_kwargs": {"\ud800": 1}}, "chat_template_kwargs"),
    ],
)
def test_half_a_character_is_400(server, changes, mention):
    body = json.dumps({"messages": HELLO} | changes)
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.base_url + "/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert mention in answer.json()["error"]["message"]


def test_harmless_fields_are_ignored(client, server):
    answer = client.chat.completions.create(
        model=server.model_id,
        messages=HELLO,
        max_tokens=4,
        n=1,
        user="somebody",
        metadata={"a": "b"},
        frequency_penalty=0,
        presence_penalty=0.0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        extra_body={"chat_template_kwargs": {"enable_thinking": False}, "seed": None, "stop": None, "top_p": None},
    )
    assert answer.usage.completion_tokens > 0


def test_a_body_not_sent_as_json_is_refused(idle_server):
    """Also keeps web pages out: a browser asks before it sends this header to another origin, and gets no answer."""
    answer = httpx.post(idle_server.base_url + "/completions", content=b'{"prompt": "x"}')
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]
    asked = httpx.options(
        idle_server.base_url + "/completions",
        headers={"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"},
    )
    assert "access-control-allow-origin" not in asked.headers


def test_a_huge_body_is_refused(idle_server):
    body = b'{"prompt": "' + b"x" * 17 * 1024**2 + b'"}'
    answer = httpx.post(
        idle_server.base_url + "/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    assert "16 MiB" in answer.json()["error"]["message"]


def test_unknown_paths_and_models_are_404(idle_server):
    answer = httpx.get(idle_server.base_url + "/nothing")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert httpx.get(idle_server.base_url + "/completions").status_code == 405
    with client_of(idle_server) as client:
        with pytest.raises(openai.NotFoundError, match="Ask for 'fake'"):
            client.completions.create(model="gpt-4", prompt="x")
        for name in ("fake", "org/fake"):
            assert client.completions.create(model=name, prompt="x", max_tokens=2).model == "fake"
            assert client.models.retrieve(name).id == "fake"
        assert [model.id for model in client.models.list()] == ["fake"]


def test_a_program_that_asks_for_another_name_is_answered_under_an_alias(target):
    config = load_config(None, assignments=["serve.aliases=gpt-5.5, gpt-4", "serve.port=0"]).serve
    with Server(target, config=config) as server, client_of(server) as client:
        for name in ("gpt-4", "gpt-5.5", "tiny-hybrid"):
            assert client.completions.create(model=name, prompt="x", max_tokens=2).model == "tiny-hybrid"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-3", prompt="x", max_tokens=2)


def test_metrics_count_what_happened(fake_server):
    with client_of(fake_server) as client:
        client.completions.create(model="fake", prompt=[40, 41], max_tokens=10)
    seen = counters(fake_server)
    assert seen['nds_requests_total{endpoint="/v1/completions",outcome="ok"}'] == 1
    assert seen["nds_prompt_tokens_total"] == 2
    assert seen["nds_generated_tokens_total"] == 10
    assert seen["nds_rounds_total"] == 3  # one token from the prefill, three a round
    assert (seen["nds_accepted_length_sum"], seen["nds_accepted_length_count"]) == (9, 3)
    assert seen["nds_first_token_seconds_count"] == seen["nds_request_seconds_count"] == 1
    assert seen["nds_waiting_requests"] == seen["nds_active_requests"] == 0


def test_a_draft_shows_in_the_usage(idle_server):
    with client_of(idle_server) as client:
        usage = client.completions.create(model="fake", prompt="x", max_tokens=10).usage
    assert usage.speculative == {"rounds": 3, "accepted_length": 3.0}


def test_an_engine_is_asked_with_the_key_of_the_environment(fake_served, monkeypatch):
    with Server(fake_served, config=ServeConfig(port=0), api_key="s3cret") as server:
        monkeypatch.setenv("NDS_API_KEY", "s3cret")
        assert connect(server.url).model == "fake"
        monkeypatch.delenv("NDS_API_KEY")
        with pytest.raises(InputError, match="401"):
            connect(server.url)
