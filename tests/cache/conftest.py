"""A loaded tiny target, conversations of many lengths, and folders as bytes."""

import json

import pytest

from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.targets import Target
from tests import kill9

TAPS = (1, 4)
DATA = DataConfig(min_loss_tokens=4, max_length=160)
CACHE = CacheConfig(shard_bytes=120_000, batch_tokens=256)  # several shards, several batches in each
SAMPLES = 36


def write_conversations(path, count=SAMPLES):
    """``count`` usable conversations between lines that are not."""
    with open(path, "w") as file:
        for n in range(count):
            turns = [("user", f"question {n} " * (1 + n % 5)), ("assistant", "state of a hybrid " * (1 + n * 7 % 11))]
            file.write(json.dumps({"conversations": [{"role": r, "content": c} for r, c in turns]}) + "\n")
            if n == 3:
                file.write("{broken\n")
        file.write('{"conversations": []}\n')
    return path


@pytest.fixture(scope="session")
def target(tiny_hybrid):
    return Target.load(str(tiny_hybrid))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("conversations") / "data.jsonl")


@pytest.fixture(scope="session")
def built(target, conversations, tmp_path_factory):
    """An undisturbed cache. Read only: copy it to change it."""
    from nemotron_dspark.cache.build import build_cache

    folder = tmp_path_factory.mktemp("cache") / "built"
    build_cache(target, conversations, folder, taps=TAPS, data=DATA, cache=CACHE)
    return folder


@pytest.fixture
def contents():
    return kill9.contents
