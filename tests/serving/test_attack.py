"""Under load and attack, on this machine only: nothing hangs, no place is lost, memory comes back, health is true."""

import asyncio
import gc
import random
import socket
import weakref

import httpx
import pytest

from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.errors import InputError
from nemotron_dspark.serving import guard, listen
from nemotron_dspark.serving.engine import Engine
from nemotron_dspark.serving.guard import Access
from nemotron_dspark.serving.listen import Server
from tests.serving import hostile
from tests.serving.test_server import WAIT, counters, post_and_stay, root, until

KEY = "a-key-of-a-test"


def health(server):
    answer = httpx.get(root(server) + "/health", timeout=WAIT)
    return answer.status_code, answer.json()


@pytest.fixture
def left_over(monkeypatch):
    """A function that gives the requests which are still held in this process."""
    held = weakref.WeakSet()
    submit = Engine.submit

    def noted(*arguments):
        ticket = submit(*arguments)
        held.add(ticket)
        return ticket

    monkeypatch.setattr(Engine, "submit", noted)

    def found():
        if held:
            gc.collect()
        return list(held)

    return found


@pytest.fixture
def check_quiet(fake, left_over):
    def check(server):
        until(lambda: health(server) == (200, {"status": "ok", "active": 0, "waiting": 0}))
        assert not fake.alive
        until(lambda: not left_over())

    return check


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_bodies_are_answered_and_never_break_anything(fake_server, check_quiet, seed):
    statuses = {}
    with httpx.Client(base_url=fake_server.base_url, timeout=WAIT) as client:
        for path, body, kind in hostile.bodies(200, seed):
            answer = client.post(path, content=body, headers={"Content-Type": kind})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), (answer.text, body[:300])
            if answer.status_code != 200:
                message = answer.json()["error"]["message"]
                assert message.endswith(".")
                assert len(message) < 1000  # nobody's body comes back at him
    assert statuses[200] > 5
    assert statuses[400] > 100
    check_quiet(fake_server)


def test_five_hundred_requests_in_bursts_lose_nothing(fake_served, fake, check_quiet):
    """Some are read to their end, some leave at once, later or within a stream; what finds no room is told so."""
    told = {"whole": 0, "stream": 0, "left": 0, "full": 0}

    async def ask(client, number):
        chance = random.Random(number)
        body = {"prompt": "x" * chance.randint(1, 2000), "max_tokens": chance.randint(1, 90)}
        kind = number % 3
        if kind == 0:
            answer = await client.post("/completions", json=body)
            told["full" if answer.status_code == 503 else "whole"] += 1
            assert answer.status_code == 503 or len(answer.json()["choices"][0]["text"]) > 0
        elif kind == 1:
            async with client.stream("POST", "/completions", json=body | {"stream": True}) as answer:
                lines = [line async for line in answer.aiter_lines()]
            told["full" if answer.status_code == 503 else "stream"] += 1
            assert answer.status_code == 503 or lines[-2] == "data: [DONE]"
        else:
            try:
                await asyncio.wait_for(
                    client.post("/completions", json=body | {"max_tokens": 2000, "stream": number % 2 == 0}),
                    chance.choice((0.001, 0.01, 0.05)),
                )
            except (TimeoutError, httpx.HTTPError):
                told["left"] += 1
            else:
                told["full"] += 1

    async def burst(numbers):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=WAIT, limits=limits) as client:
            await asyncio.gather(*(ask(client, number) for number in numbers))

    config = ServeConfig(port=0, max_batch_size=4, max_queue=24)
    with Server(fake_served, config=config) as server:
        for first in range(0, 500, 100):
            asyncio.run(burst(range(first, first + 100)))
        check_quiet(server)
        assert sum(told.values()) == 500
        assert min(told.values()) > 0
        seen = counters(server)
        outcomes = {
            name: seen.get(f'nds_requests_total{{endpoint="/v1/completions",outcome="{name}"}}', 0)
            for name in ("ok", "cancelled", "failed", "rejected")
        }
        assert outcomes["ok"] >= told["whole"] + told["stream"]
        assert outcomes["rejected"] <= told["left"]  # a body that its client left in the middle
        assert max(fake.together) <= 4


def test_a_reader_who_does_not_read_holds_no_place_and_not_the_end(fake_served, left_over, monkeypatch):
    monkeypatch.setattr(listen, "GRACE", 0)
    bound = listen.bind("127.0.0.1", 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted connections have it too: they fill soon
    with Server(fake_served, config=ServeConfig(port=0, max_batch_size=2), bound=bound) as server:
        asked = {"prompt": "x", "max_tokens": 2000, "stream": True, "logprobs": 5}  # more than any buffer holds
        stuck = [post_and_stay(server, **asked) for _ in range(2)]
        until(lambda: counters(server)["nds_request_seconds_count"] == 2)  # both were decoded to their end
        assert health(server) == (200, {"status": "ok", "active": 0, "waiting": 0})
        assert httpx.post(server.base_url + "/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        assert left_over()  # what they did not read waits for them
        for connection in stuck:
            connection.close()
        until(lambda: not left_over())  # and goes with them
        last = post_and_stay(server, **asked)
        until(lambda: counters(server)["nds_request_seconds_count"] == 4)
    last.close()


def test_a_megabyte_is_read_beside_other_requests(fake_server, check_quiet):
    long = httpx.Timeout(WAIT)
    with httpx.Client(base_url=fake_server.base_url, timeout=long) as client:
        for prompt in ("s" * 2**20, [7] * 2**19):
            answer = client.post("/completions", json={"prompt": prompt})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        messages = [{"role": "user", "content": "state " * 175_000}]
        answer = client.post("/chat/completions", json={"messages": messages})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    check_quiet(fake_server)


def test_a_body_that_does_not_come_is_not_waited_for(fake_server, fake, check_quiet, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    host, port = root(fake_server).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b'Content-Length: 99\r\n\r\n{"prompt"')
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    fake.pause = 0.05  # an answer may take longer than a body
    answer = httpx.post(fake_server.base_url + "/completions", json={"prompt": "x", "max_tokens": 20})
    assert answer.status_code == 200
    check_quiet(fake_server)


@pytest.fixture
def locked(fake_served):
    with Server(fake_served, config=ServeConfig(port=0), api_key=KEY) as server:
        yield server


@pytest.mark.parametrize(
    "given", [{}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer " + KEY[:-1]},
              {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer"}, {"Authorization": b"Bearer \xff"}]
)  # fmt: skip
def test_without_the_key_nothing_is_answered_but_health(locked, fake, given):
    big = b'{"prompt": "' + b"x" * 2**20
    for method, path in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
                         ("GET", "/metrics"), ("GET", "/nothing")):  # fmt: skip
        answer = httpx.request(method, root(locked) + path, headers=given, content=big if method == "POST" else None)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text
    assert httpx.get(root(locked) + "/health", headers=given).status_code == 200
    assert fake.together == []


def test_with_the_key_the_openai_client_is_answered(locked):
    import openai

    with openai.OpenAI(base_url=locked.base_url, api_key=KEY, max_retries=0) as client:
        assert client.completions.create(model="fake", prompt="x", max_tokens=3).choices[0].text
    with (
        openai.OpenAI(base_url=locked.base_url, api_key="other", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="Bearer KEY"),
    ):
        client.models.list()


def test_a_key_that_no_header_carries_is_refused_and_none_is_printed():
    for key in ("", " ", "a\nb", "schlüssel"):
        with pytest.raises(InputError, match="API key"):
            Access(key)
    assert KEY not in repr(Access(KEY))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "my.machine"])
def test_other_machines_are_answered_with_a_key_or_when_it_is_said(host):
    with pytest.raises(InputError, match="--no-auth") as caught:
        Access().check_host(host)
    assert "NDS_API_KEY" in caught.value.do
    Access(KEY).check_host(host)
    Access(open_to_all=True).check_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_this_machine_needs_no_key(host):
    Access().check_host(host)


def test_a_web_page_that_calls_itself_this_machine_is_refused(fake_server, locked):
    """DNS rebinding: its requests are same-origin and need no permission, but they carry its own name."""
    asked = {"json": {"prompt": "x", "max_tokens": 2}}
    for name, status in (("evil.example", 403), ("evil.example:80", 403), ("localhost:1", 200), ("[::1]:80", 200)):
        answer = httpx.post(fake_server.base_url + "/completions", headers={"Host": name}, **asked)
        assert answer.status_code == status
    headers = {"Host": "proxy.example", "Authorization": f"Bearer {KEY}"}
    assert httpx.post(locked.base_url + "/completions", headers=headers, **asked).status_code == 200
