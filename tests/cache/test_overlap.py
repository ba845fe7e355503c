"""The target runs while conversations are still tokenised, several processes share a build, and no byte shows it."""

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

from nemotron_dspark import processes
from nemotron_dspark.cache import batches, tokens
from nemotron_dspark.cache.build import build_cache, helping_targets
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.config.run import TargetConfig
from nemotron_dspark.data import pieces
from nemotron_dspark.errors import CheckError, EnvironmentFault, InputError
from nemotron_dspark.targets import Target
from tests.cache.conftest import CACHE, DATA, TAPS, write_conversations
from tests.kill9 import prepared_forkserver
from tests.test_processes import alive

SAMPLES = 45
PATIENCE = 240.0  # seconds until a test fails that waits for another process


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """Enough windows and pieces of the file for things to happen at the same time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batches, "_WINDOW", 4)
        patched.setattr(batches, "_FIRST", 2)
        patched.setattr(pieces, "PIECE_BYTES", 1_000)
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

    def capture(self, *given):
        self.forwards += 1
        self._before(self.forwards)
        return self._target.capture(*given)


@pytest.fixture(scope="module")
def expected(target, data, small_pieces):
    """All shards one after the other, by a loop that knows the format and the batches, and nothing of the builder."""
    samples = [
        tokenised
        for piece in pieces.tokenised_pieces(Path(data), target.tokenizer, DATA)
        for _, tokenised in piece.samples
    ]
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


def test_the_target_runs_before_the_last_lines_are_tokenised(target, data, expected, tmp_path, monkeypatch):
    forward, found = threading.Event(), pieces.tokenised_pieces

    def holding_back(*given, **named):
        *first, last = found(*given, **named)
        yield from first
        assert forward.wait(PATIENCE), "nothing was computed"
        yield last

    monkeypatch.setattr(tokens, "tokenised_pieces", holding_back)
    build(Wrapped(target, lambda _: forward.set()), data, tmp_path / "c")
    assert shards(tmp_path / "c") == expected


def test_a_batch_is_written_while_the_next_is_computed(target, data, tmp_path, monkeypatch):
    later, written, write = threading.Event(), [], os.pwrite

    def waiting(*given):
        written.append(later.wait(PATIENCE))
        return write(*given)

    monkeypatch.setattr("os.pwrite", waiting)
    build(Wrapped(target, lambda forward: later.set() if forward == 2 else None), data, tmp_path / "c")
    assert all(written)


def test_what_fails_while_tokenising_costs_nothing_that_was_computed(
    target, data, expected, tmp_path, monkeypatch, contents
):
    found, computed = pieces.tokenised_pieces, threading.Event()

    def broken(*given, **named):
        yield from list(found(*given, **named))[:-1]
        assert computed.wait(PATIENCE)
        raise InputError("The last line is broken.", "Mend it.")

    with monkeypatch.context() as patched:
        patched.setattr(tokens, "tokenised_pieces", broken)
        with pytest.raises(InputError, match="last line is broken"):
            build(Wrapped(target, lambda forward: computed.set() if forward == 3 else None), data, tmp_path / "c")
    assert build(target, data, tmp_path / "c").reused_samples > 0
    assert shards(tmp_path / "c") == expected
    assert not (tmp_path / "c" / ".build").exists()


class Disk:
    """What `shutil.disk_usage` says of a small disk that holds nothing but ``folder``."""

    def __init__(self, folder, size):
        self._folder, self._size, self._real = folder, size, shutil.disk_usage

    def __call__(self, path):
        used = sum(512 * file.stat().st_blocks for file in self._folder.rglob("shard-*"))
        return self._real("/")._replace(free=self._size + 16 * 1024**2 - used)


def test_too_little_space_is_refused_by_an_estimate_before_the_target_runs(
    target, data, expected, tmp_path, monkeypatch
):
    found, refused = pieces.tokenised_pieces, threading.Event()

    def holding_back(*given, **named):
        parts = list(found(*given, **named))
        yield from parts[: len(parts) // 2]
        assert refused.wait(PATIENCE)
        yield from parts[len(parts) // 2 :]

    monkeypatch.setattr(tokens, "tokenised_pieces", holding_back)
    monkeypatch.setattr(shutil, "disk_usage", Disk(tmp_path, len(expected) * 0.85))
    stop = tokens.GrowingTokens.stop
    monkeypatch.setattr(tokens.GrowingTokens, "stop", lambda self: (refused.set(), stop(self))[1])
    with pytest.raises(EnvironmentFault, match=r"needs about 0\.\d\d GB more"):
        build(Wrapped(target, lambda _: pytest.fail("the target ran")), data, tmp_path / "c")


def test_space_that_an_estimate_missed_is_refused_when_it_is_known(target, data, expected, tmp_path, monkeypatch):
    found, computed = pieces.tokenised_pieces, threading.Event()

    def holding_back(*given, **named):
        *first, last = found(*given, **named)
        yield from first
        assert computed.wait(PATIENCE)
        yield last

    with monkeypatch.context() as patched:
        patched.setattr(tokens, "tokenised_pieces", holding_back)
        patched.setattr(shutil, "disk_usage", Disk(tmp_path, len(expected) * 0.97))
        with pytest.raises(EnvironmentFault, match=r"needs 0\.\d\d GB more"):
            build(Wrapped(target, lambda forward: computed.set() if forward == 2 else None), data, tmp_path / "c")
    assert build(target, data, tmp_path / "c").reused_samples > 0
    assert shards(tmp_path / "c") == expected


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
    with pytest.raises(EnvironmentFault, match="ended by SIGKILL"):
        build(here, data, tmp_path / "c", helpers=[helper])
    assert build(target, data, tmp_path / "c").reused_samples > 0
    assert shards(tmp_path / "c") == expected


def build_apart(folder, data, out, note):
    torch.set_num_threads(1)
    batches._WINDOW, batches._FIRST, pieces.PIECE_BYTES = 4, 2, 1_000
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
        def capture(self, *given):
            captured = super().capture(*given)
            captured.last[0, 0, 0] = float("nan") if self.forwards == 3 else 0.0
            return captured

    with pytest.raises(CheckError, match=r"sample \d+ are not finite"):
        build(Broken(target, lambda _: None), data, tmp_path / "c")


def test_processes_share_the_threads_of_a_cpu(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert len(helping_targets(TargetConfig(name="t"), torch.device("cpu"), 3)) == 2
    assert threads == [2]
    assert helping_targets(TargetConfig(name="t"), torch.device("cpu"), None) == []


def test_every_gpu_computes_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cuda = torch.device("cuda")

    def devices(processes, device="auto"):
        loads = helping_targets(TargetConfig(name="t", device=device), cuda, processes)
        return [load.args[0].device for load in loads]

    assert devices(None) == ["cuda:1", "cuda:2", "cuda:3"]
    assert devices(2) == ["cuda:1"]
    assert devices(None, "cuda:2") == []
    with pytest.raises(InputError, match="5 processes"):
        devices(5)
