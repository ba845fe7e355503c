"""A tiny real target to serve, and servers around it and around the fake decoder."""

import pytest

from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.recipe import tiny
from nemotron_dspark.serving.listen import Server
from nemotron_dspark.serving.service import Served
from nemotron_dspark.targets import Target
from tests.serving.fake_decoder import SCRIPT, FakeDecoder


@pytest.fixture(scope="session")
def serve_tokenizer():
    return tiny.make_tokenizer([SCRIPT], 330)


@pytest.fixture
def fake(serve_tokenizer):
    return FakeDecoder(serve_tokenizer)


@pytest.fixture
def fake_served(fake, serve_tokenizer):
    return Served("fake", frozenset({"org/fake"}), fake, serve_tokenizer, vocab_size=330, max_positions=4096)


@pytest.fixture
def fake_server(fake, fake_served):
    """A batch of two, a queue of one."""
    with Server(fake_served, config=ServeConfig(port=0, max_batch_size=2, max_queue=1)) as server:
        yield server
        fake.go.set()


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    folder = tiny.random_target(tmp_path_factory.mktemp("served") / "tiny-hybrid", pattern="M*-M")
    return Target.load(str(folder))


@pytest.fixture(scope="session")
def server(target):
    """The tiny target without a draft; shared, so tests look at differences of its counters only."""
    with Server(target, config=ServeConfig(port=0, max_batch_size=4)) as running:
        yield running
