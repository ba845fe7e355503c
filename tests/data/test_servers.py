"""Several servers of one target: work goes to those that answer, and nothing is lost or done twice."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemotron_dspark.data.regenerate import regenerate
from nemotron_dspark.errors import EnvironmentFault, InputError


class Process:
    """`fake_server.py`, which can be killed and started again at the same port."""

    def __init__(self, seconds):
        self.seconds, self.port = seconds, 0
        self.start()

    def start(self):
        script = Path(__file__).with_name("fake_server.py")
        words = [sys.executable, "-S", str(script), str(self.port), str(self.seconds)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def servers():
    with contextlib.ExitStack() as stack:
        started = []

        def start(*seconds):
            for each in seconds:
                started.append(Process(each))
                stack.callback(started[-1].kill)
            return started

        yield start


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def when():
    """Call functions once a file has so many lines, in another thread."""
    threads, failed = [], []

    def watch(path, *steps):
        def run():
            for count, *actions in steps:
                while lines(path) < count:
                    time.sleep(0.01)
                for act in actions:
                    try:
                        act()
                    except Exception as error:
                        failed.append(error)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    yield watch
    for thread in threads:
        thread.join(timeout=30)
    assert not failed


def test_servers_that_are_killed_lose_and_double_nothing(servers, when, tmp_path, caplog):
    count = int(os.environ.get("PROMPTS", "160"))  # docs/data.md has the figures of 10 000
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"q{n}", f"r{n}"][: 1 + n % 2]}) + "\n" for n in range(count)))
    steady, slow, gone, back = servers(0.01, 0.1, 0.01, 0.01)
    when(out, (count // 4, gone.kill, back.kill), (count // 2, back.start))
    report = regenerate(prompts, out, base_url=[s.url for s in (steady, slow, gone, back)], concurrency=8)
    print(f"{count} prompts, {report.seconds:.1f} s, by server: {list(report.servers.values())}")
    found = rows(out)
    assert [row["id"] for row in found] == [str(n + 1) for n in range(count)]  # each once, in order
    for n, row in enumerate(found):
        said = [turn["content"].partition(": ")[2] for turn in row["conversations"] if turn["role"] == "assistant"]
        assert said == [f"q{n}", f"r{n}"][: 1 + n % 2]
    assert report.answered == sum(report.servers.values()) == count
    assert not report.skipped.total
    assert report.servers[steady.url] > report.servers[slow.url]
    assert f"{gone.url} does not answer" in caplog.text


def test_a_server_that_comes_back_is_used_again(servers, when, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{n}"}) + "\n" for n in range(40)))
    (one,) = servers(0.02)
    when(out, (10, one.kill, one.start))
    report = regenerate(prompts, out, base_url=one.url, concurrency=2)
    assert report.servers == {one.url: 40}


def test_what_is_left_is_asked_by_the_next_run(servers, when, tmp_path, monkeypatch):
    monkeypatch.setattr("nemotron_dspark.data.servers._RETRIES", 1)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{n}"}) + "\n" for n in range(60)))
    one, other = servers(0.02, 0.02)
    when(out, (20, one.kill, other.kill))
    urls = [one.url, other.url]
    with pytest.raises(EnvironmentFault, match=r"servers at .* fail: .*"):
        regenerate(prompts, out, base_url=urls, concurrency=2)
    kept = lines(out)
    other.start()
    report = regenerate(prompts, out, base_url=urls, concurrency=2)
    assert (report.reused, report.answered) == (kept, 60)
    assert [row["id"] for row in rows(out)] == [str(n + 1) for n in range(60)]


def test_what_is_no_server_is_refused(tmp_path, servers):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "q"}))
    with pytest.raises(InputError, match="no URL"):
        regenerate(prompts, tmp_path / "out.jsonl", base_url=["127.0.0.1:8000/v1"])
