"""kill -9 at random moments: the resumed cache is byte for byte the undisturbed one.

A moment is a call that changes the disk; the process kills itself right before or right after it. Processes come from a
fork server that has the heavy imports done.
"""

import json
import multiprocessing
import os
import random
import signal

import pytest

from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.targets import Target
from tests.cache.conftest import CACHE, DATA, TAPS, write_conversations

CALLS = ("pwrite", "fsync", "ftruncate", "replace", "rename", "unlink", "rmdir")
TRIES = 10


def build_and_die(target_folder, conversations, folder, at, after, count_file):
    """Build in this process; kill it at disk call number ``at``, or count the calls when ``at`` is None."""
    import torch

    torch.set_num_threads(1)
    target = Target.load(target_folder)
    calls = 0

    def dying(real):
        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*given, **named)
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))
    build_cache(target, conversations, folder, taps=TAPS, data=DATA, cache=CACHE)
    with open(count_file, "w") as file:
        json.dump(calls, file)


@pytest.fixture(scope="module")
def run():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cache.test_kill", "transformers.models.nemotron_h.modeling_nemotron_h"])

    def run(*arguments):
        process = context.Process(target=build_and_die, args=arguments)
        process.start()
        process.join(120)
        return process.exitcode

    return run


@pytest.mark.slow
def test_resumed_after_kill_9_equals_undisturbed(run, target, contents, tmp_path):
    data = str(write_conversations(tmp_path / "data.jsonl", 16))
    where, count = str(target.folder), str(tmp_path / "count")
    assert run(where, data, str(tmp_path / "whole"), None, False, count) == 0
    expected = contents(tmp_path / "whole")
    total = json.loads((tmp_path / "count").read_text())
    moments = random.Random(7).sample(range(1, total + 1), TRIES)
    states = []
    for number, moment in enumerate(sorted(moments)):
        folder = tmp_path / f"try{number}"
        assert run(where, data, str(folder), moment, number % 2 == 1, count) == -signal.SIGKILL
        states.append(tuple(sorted(contents(folder))))
        build_cache(target, data, folder, taps=TAPS, data=DATA, cache=CACHE)
        assert contents(folder) == expected, f"killed at call {moment} of {total}"
    assert len(set(states)) > 3  # the moments were really different ones
