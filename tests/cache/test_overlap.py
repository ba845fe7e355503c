"""Writing goes on beside the forwards, several processes share a build, and no byte shows it."""

import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotron_dspark import processes, stages
from nemotron_dspark.cache import batches
from nemotron_dspark.cache.build import build_cache, helper_loads
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.config import TargetConfig, load_config
from nemotron_dspark.data.conversations import Skipped
from nemotron_dspark.data.samples import read_samples
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.targets import Target
from tests.cache.conftest import CACHE, DATA, TAPS, write_conversations
from tests.kill9 import prepared_forkserver
from tests.test_processes import alive

SAMPLES = 45
PATIENCE = 240.0  # seconds until a test fails that waits for another process


@pytest.fixture(scope="module", autouse=True)
def small_buckets():
    """Enough buckets for things to happen at the same time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batches, "_BUCKET", 4)
        patched.setattr(batches, "_FIRST", 2)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("overlap") / "data.jsonl", SAMPLES)


def build(target, data, folder, **changes):
    return build_cache(target, data, folder, **{"taps": TAPS, "data": DATA, "cache": CACHE, **changes})


class Wrapped:
    """A target that calls ``before(number of the forward)`` first."""

    def __init__(self, target, before):
        self._target, self._before, self.forwards = target, before, 0

    def __getattr__(self, name):
        return getattr(self._target, name)

    def captures(self, batches, *given):
        for batch in batches:
            self.forwards += 1
            self._before(self.forwards)
            yield from self._target.captures([batch], *given)


@pytest.fixture(scope="module")
def expected(target, data, small_buckets):
    """All shards one after the other, by a loop that knows the format and the batches, and nothing of the builder."""
    found = read_samples(data, target.tokenizer, DATA)
    samples = [item.tokens for item in found if not isinstance(item, Skipped)]
    found = [b""] * len(samples)
    for batch in batches.batches(np.array([len(sample.input_ids) for sample in samples]), CACHE.batch_tokens):
        ids = torch.zeros(len(batch), max(len(samples[i].input_ids) for i in batch), dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(samples[i].input_ids)] = torch.from_numpy(samples[i].input_ids.astype(np.int64))
        captured = target.capture(ids, None, TAPS)
        for row, i in enumerate(batch):
            length = len(samples[i].input_ids)
            states = [part[row, :length].bfloat16().view(torch.int16) for part in (captured.taps, captured.last)]
            parts = [
                samples[i].input_ids,
                np.ones(length, np.uint8),
                samples[i].loss_mask,
                *(s.numpy() for s in states),
            ]
            found[i] = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return b"".join(found)


def shards(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.glob("shard-*.bin")))


def wait_until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_batch_is_written_while_the_next_is_computed(target, data, tmp_path, monkeypatch):
    later, written, write = threading.Event(), [], os.pwrite

    def waiting(*given):
        written.append(later.wait(PATIENCE))
        return write(*given)

    monkeypatch.setattr("os.pwrite", waiting)
    build(Wrapped(target, lambda forward: later.set() if forward == 2 else None), data, tmp_path / "c")
    assert all(written)


def test_too_little_space_is_refused_before_the_target_is_loaded(target, data, expected, tmp_path, monkeypatch):
    def loaded_with(free):
        usage = shutil.disk_usage("/")._replace(free=free + 16 * 1024**2)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda path: usage)
            loads = []
            build(target, data, tmp_path / "c", load=lambda: loads.append(1) or target)
            return loads

    with pytest.raises(EnvironmentFault, match=r"The cache needs \d+\.\d MB more"):
        loaded_with(len(expected) - 1)
    assert loaded_with(len(expected)) == [1]
    assert shards(tmp_path / "c") == expected
    assert loaded_with(0) == []  # it is finished


def test_the_stage_loads_no_target_for_what_does_not_fit_or_is_there(target, data, tmp_path, monkeypatch):
    config = load_config(str(target.folder), cache=CACHE.model_dump(), data=DATA.model_dump(), draft={"taps": [1, 4]})

    def build_without_loading():
        with monkeypatch.context() as patched:
            patched.setattr(Target, "of", lambda config: pytest.fail("the target is loaded"))
            return stages.build_cache(config, data, tmp_path / "c")

    usage = shutil.disk_usage("/")._replace(free=1_000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(EnvironmentFault, match="The cache needs"):
            build_without_loading()
    stages.build_cache(config, data, tmp_path / "c")
    assert build_without_loading().build.reused_samples == SAMPLES
    same = build(target, data, tmp_path / "c")  # with a target that is loaded
    assert same.reused_samples == SAMPLES


def noting_target(folder, note, deadly=0):
    """Loaded by a helper: writes its process into ``note`` at its first forward, and dies at number ``deadly``."""
    torch.set_num_threads(1)

    def before(forward):
        if forward == 1:
            Path(note).with_suffix(".part").write_text(str(os.getpid()))
            Path(note).with_suffix(".part").rename(note)
        if forward == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    return Wrapped(Target.load(folder), before)


@pytest.fixture
def forks(monkeypatch):
    """Children are forks of one process that has the libraries imported; they are started fresh otherwise."""
    context = prepared_forkserver()
    monkeypatch.setattr(processes, "START", context)
    return context


def test_two_processes_write_the_bytes_of_one(target, data, expected, tmp_path, forks):
    note = tmp_path / "note"
    here = Wrapped(target, lambda _: wait_until(note.exists))
    build(here, data, tmp_path / "c", helpers=[functools.partial(noting_target, str(target.folder), note)])
    assert shards(tmp_path / "c") == expected
    total = len(list(batches.batches(TargetCache(tmp_path / "c").lengths, CACHE.batch_tokens)))
    assert 0 < here.forwards < total
    wait_until(lambda: not alive(int(note.read_text())))


def test_a_helper_that_dies_ends_the_build_and_loses_nothing(target, data, expected, tmp_path, forks):
    note = tmp_path / "note"
    helper = functools.partial(noting_target, str(target.folder), note, deadly=2)
    here = Wrapped(target, lambda forward: wait_until(note.exists) if forward == 3 else None)
    with pytest.raises(EnvironmentFault, match="process that helps to compute was killed"):
        build(here, data, tmp_path / "c", helpers=[helper])
    assert build(target, data, tmp_path / "c").reused_samples > 0
    assert shards(tmp_path / "c") == expected


def build_apart(folder, data, out, note):
    torch.set_num_threads(1)
    batches._BUCKET, batches._FIRST = 4, 2
    processes.START = multiprocessing.get_context("fork")
    target = Wrapped(Target.load(folder), lambda forward: time.sleep(600) if forward == 3 else None)
    build(target, data, out, helpers=[functools.partial(noting_target, folder, note)])


def test_a_killed_build_leaves_no_helper_and_goes_on_with_one_process(target, data, expected, tmp_path, forks):
    note = tmp_path / "note"
    process = forks.Process(target=build_apart, args=(str(target.folder), data, tmp_path / "c", note))
    process.start()
    journal = tmp_path / "c/.build/written.journal"
    wait_until(lambda: note.exists() and journal.stat().st_size > 0)
    process.kill()
    process.join()
    wait_until(lambda: not alive(int(note.read_text())))
    assert build(target, data, tmp_path / "c").reused_samples > 0
    assert shards(tmp_path / "c") == expected


def test_a_fault_in_the_writing_thread_ends_the_build(target, data, tmp_path):
    class Broken(Wrapped):
        def captures(self, *given):
            for captured in super().captures(*given):
                captured.last[0, 0, 0] = float("nan") if self.forwards == 3 else 0.0
                yield captured

    with pytest.raises(CheckError, match=r"sample \d+ are not finite"):
        build(Broken(target, lambda _: None), data, tmp_path / "c")


def test_processes_share_the_threads_of_a_cpu(target, data, tmp_path, forks, monkeypatch):
    set_, before = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", set_.append)
    at_work = Wrapped(target, lambda _: set_[-1:] == [4] or pytest.fail(f"{set_}"))
    assert len(helper_loads(TargetConfig(name="t"), torch.device("cpu"), 2)) == 1
    assert helper_loads(TargetConfig(name="t"), torch.device("cpu"), None) == []
    note = tmp_path / "note"
    build(at_work, data, tmp_path / "c", helpers=[functools.partial(noting_target, str(target.folder), note)])
    assert set_ == [4, 8]  # and as it was
    assert before == 1


def test_every_gpu_computes_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cuda = torch.device("cuda")

    def devices(processes, device="auto"):
        loads = helper_loads(TargetConfig(name="t", device=device), cuda, processes)
        return [load.args[0].device for load in loads]

    assert devices(None) == ["cuda:1", "cuda:2", "cuda:3"]
    assert devices(2) == ["cuda:1"]
    assert devices(None, "cuda:2") == []
    with pytest.raises(InputError, match="5 processes"):
        devices(5)
