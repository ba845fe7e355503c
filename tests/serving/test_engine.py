"""The engine alone: shared rounds, cancelling, failures that stay with their request."""

import queue
import threading
import time

import pytest

from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.errors import InputError
from nemotron_dspark.serving.engine import Busy, Engine, Failed, Finished, GenerationRequest, Stopped, TextDelta
from nemotron_dspark.serving.metrics import Metrics

WAIT = 20  # seconds after which a test gives up; nothing depends on it otherwise


class Client:
    """Submits a job and collects its events."""

    def __init__(self, engine, tokens=30, prompt=(1, 2, 3), **job):
        self.events = queue.Queue()
        self.ticket = engine.submit(GenerationRequest(prompt, Sampling(max_new_tokens=tokens), **job), self.events.put)

    def next(self):
        return self.events.get(timeout=WAIT)

    def end(self):
        while isinstance(event := self.next(), TextDelta):
            pass
        return event


@pytest.fixture
def make_engine(fake, serve_tokenizer):
    engines = []

    def make(max_batch_size=2, max_queue=2, prefill_tokens=4):
        sizes = {"max_batch_size": max_batch_size, "max_queue": max_queue, "prefill_tokens": prefill_tokens}
        engine = Engine(fake, serve_tokenizer, **sizes, metrics=Metrics())
        engines.append(engine)
        engine.start()
        return engine

    yield make
    fake.go.set()
    for engine in engines:
        engine.stop()


@pytest.fixture
def engine(make_engine):
    return make_engine()


def text_of(fake, tokenizer, count):
    return tokenizer.decode([fake.script[i % len(fake.script)] for i in range(count)])


def test_requests_share_rounds(engine, fake):
    fake.go.clear()
    first, second = Client(engine), Client(engine)
    fake.go.set()
    assert isinstance(first.end(), Finished)
    assert isinstance(second.end(), Finished)
    assert max(fake.together) == 2
    assert not fake.alive  # every generation was dropped


def test_streamed_pieces_and_whole_answers_are_the_same_text(engine, fake, serve_tokenizer):
    whole, streamed = Client(engine, tokens=200).end(), Client(engine, tokens=200, stream=True)
    pieces = []
    while isinstance(event := streamed.next(), TextDelta):
        pieces.append(event.text)
    assert len(pieces) > 20
    assert all(pieces)
    assert "".join(pieces) + event.text == whole.text == text_of(fake, serve_tokenizer, 200)
    assert whole.usage == event.usage
    assert (whole.reason, whole.usage.completion_tokens, whole.usage.prompt_tokens) == ("length", 200, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_request_and_frees_its_place(engine, fake, serve_tokenizer, stream):
    client = Client(engine, tokens=10**9, stream=stream, stops=("kept what",))
    shown = ""
    while isinstance(event := client.next(), TextDelta):
        shown += event.text
    whole = text_of(fake, serve_tokenizer, 200)
    assert shown + event.text == whole[: whole.index("kept what")]
    assert event.reason == "stop"
    needed = next(n for n in range(200) if "kept what" in text_of(fake, serve_tokenizer, n))
    assert event.usage.completion_tokens == needed
    assert engine.active == 0
    assert not fake.alive


def test_the_queue_is_bounded_and_counts_free_places_of_the_batch(engine, fake):
    fake.go.clear()
    clients = [Client(engine) for _ in range(4)]  # two places in the batch, two in the queue
    with pytest.raises(Busy):
        Client(engine)
    fake.go.set()
    assert all(isinstance(client.end(), Finished) for client in clients)
    assert isinstance(Client(engine).end(), Finished)


def test_cancelling_frees_batch_and_queue(engine, fake):
    fake.go.clear()
    running = [Client(engine, tokens=10**9) for _ in range(2)]
    waiting = [Client(engine) for _ in range(2)]
    engine.cancel(waiting[0].ticket)
    replacement = Client(engine)  # no Busy: the place in the queue is free at once
    for client in running:
        engine.cancel(client.ticket)
    fake.go.set()
    assert isinstance(waiting[1].end(), Finished)
    assert isinstance(replacement.end(), Finished)
    assert waiting[0].events.empty()
    assert all(client.events.empty() for client in running)
    assert not fake.alive


def test_a_bad_prompt_is_its_senders_fault_only(engine, fake):
    fake.fail_start = InputError("The prompt has no tokens.", "Give one.")
    assert Client(engine).end() == Failed(400, "The prompt has no tokens. Give one.")
    fake.fail_start = ZeroDivisionError("inside")
    assert Client(engine).end().status == 500
    assert isinstance(Client(engine).end(), Finished)


def test_a_prompt_that_cannot_be_read_fails_alone(engine, fake):
    running = Client(engine, tokens=3000, stream=True)
    assert isinstance(running.next(), TextDelta)
    fake.fail_read = RuntimeError("out of memory")
    end = Client(engine).end()
    assert end.status == 500
    assert "out of memory" in end.message
    assert isinstance(running.end(), Finished)
    assert engine.active == 0


def test_memory_is_given_back_once_there_is_nothing_to_do(engine, fake, monkeypatch):
    given = queue.Queue()
    monkeypatch.setattr("nemotron_dspark.serving.engine.REST_SECONDS", 0.02)
    monkeypatch.setattr("nemotron_dspark.serving.engine.give_back", lambda: given.put(engine.active + engine.waiting))
    for _ in range(2):
        fake.go.clear()
        client = Client(engine)
        time.sleep(0.1)
        assert given.empty()  # it is busy
        fake.go.set()
        assert isinstance(client.end(), Finished)
        assert given.get(timeout=WAIT) == 0
        time.sleep(0.1)
        assert given.empty()  # once is enough


def test_a_long_prompt_is_read_between_the_rounds_of_others(engine, fake):
    """Of 100 tokens four are read at a time: 25 pieces, and a round of the other's after each."""
    fake.go.clear()
    short, long = Client(engine, tokens=10**6, stream=True), Client(engine, tokens=2, prompt=(1,) * 100)
    fake.go.set()
    assert isinstance(long.end(), Finished)
    engine.cancel(short.ticket)
    assert fake.together[:24] == [1] * 24
    assert isinstance(short.next(), TextDelta)


def test_a_failed_round_fails_its_requests_and_the_engine_goes_on(engine, fake):
    fake.fail_step = RuntimeError("out of memory")
    end = Client(engine).end()
    assert end.status == 500
    assert "out of memory" in end.message
    assert isinstance(Client(engine).end(), Finished)
    assert engine.healthy
    assert not fake.alive


def test_a_dead_thread_is_not_healthy_and_leaves_nobody_waiting(engine, fake):
    fake.go.clear()
    clients = [Client(engine) for _ in range(3)]
    fake.fail_step = SystemExit()
    fake.go.set()
    assert {client.end().status for client in clients} == {503}
    engine._thread.join(WAIT)
    assert not engine.healthy
    with pytest.raises(Stopped):
        Client(engine)


def test_a_round_that_does_not_end_is_stuck_until_it_does(engine, fake, monkeypatch):
    monkeypatch.setattr("nemotron_dspark.serving.engine.STUCK_SECONDS", 0.05)
    assert not engine.stuck
    fake.go.clear()
    client = Client(engine)
    assert not engine.stuck  # it has just come
    time.sleep(0.06)
    assert engine.stuck
    fake.go.set()
    client.end()
    assert not engine.stuck


def test_stopping_lets_active_requests_end_within_the_grace(make_engine, fake):
    engine = make_engine(max_batch_size=1)
    fake.go.clear()
    active = Client(engine)
    while engine.active == 0:
        time.sleep(0.001)
    waiting = Client(engine)
    stopping = threading.Thread(target=engine.stop, args=(WAIT,))
    stopping.start()
    while engine.healthy:
        time.sleep(0.001)
    fake.go.set()
    stopping.join(WAIT)
    assert isinstance(active.end(), Finished)
    assert waiting.end().status == 503
    with pytest.raises(Stopped):
        Client(engine)


def test_stopping_without_grace_cuts_off(engine):
    client = Client(engine, tokens=10**9)
    engine.stop()
    assert client.end().status == 503
