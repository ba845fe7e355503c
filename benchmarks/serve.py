"""What `nds serve` gives of the decoder's speed, in steady state: tokens a second and latencies through HTTP.

So many clients as there are requests at once ask one question after the other, streamed; the first answers are cut so
that ends are spread. Beside them stand a loop that calls the decoder itself, in a process of its own, and vLLM for CPUs
where NDS_VLLM_PYTHON names its python. All run in turns on the same prompts, greedily, with their prefix caches off, as
many windows each as there are rounds; counted are tokens, by the servers' own counters, and processor time, of all
their processes. Without --prompts they are random tokens.

    python benchmarks/serve.py --target T [--draft D] [--prompts P] [--requests 1,8,32] [--tokens 128] [--json]
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engines import free_port, running

CLOCK = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Window:
    """What one system did while it was watched."""

    tokens: int
    seconds: float
    processor: float  # seconds of user and system time, of all its processes
    first: tuple[float, ...] = ()  # seconds to the first text of each answer
    between: tuple[float, ...] = ()  # seconds between two arrivals of text


# --- the decoder's loop, in a process of its own ---


def worker(target: str, draft: str, dtype: str, prompts: str) -> None:
    """Print the prompts' ids, then a window for each line of standard input."""
    from nemotron_dspark.config import load_config
    from nemotron_dspark.decoding.decoder import Decoder
    from nemotron_dspark.decoding.pair import load_pair
    from nemotron_dspark.decoding.sampling import Sampling
    from nemotron_dspark.evaluation.measure import prompt_ids

    config = load_config({"name": target, "dtype": dtype, "proofs": False})
    loaded, drafting = load_pair(config.target, Path(draft) if draft else None)
    size = loaded.spec.vocab_size
    lengths = random.Random(0)
    drawn = [[lengths.randrange(size // 2, size) for _ in range(lengths.randint(32, 160))] for _ in range(200)]
    ids = prompt_ids(loaded, Path(prompts)) if prompts else drawn
    print(json.dumps([each for each in ids if len(each) <= 512]), flush=True)
    decoder = Decoder(loaded, drafting)
    for line in sys.stdin:
        asked = json.loads(line)
        count, tokens = asked["requests"], asked["tokens"]
        coming = itertools.cycle(ids)
        active = [
            decoder.start(next(coming), Sampling(temperature=0.0, max_new_tokens=limit))
            for limit in spread(count, tokens)
        ]
        written, began, processor = 0, 0.0, 0.0
        while not began or time.perf_counter() < began + asked["seconds"]:
            if not began and not any(each.finished is None and len(each.tokens) < 8 for each in active):
                written, began, processor = 0, time.perf_counter(), time.process_time()
            before = sum(len(each.tokens) for each in active)
            decoder.step(active)
            written += sum(len(each.tokens) for each in active) - before
            for at, each in enumerate(active):
                if each.finished:
                    active[at] = decoder.start(next(coming), Sampling(temperature=0.0, max_new_tokens=tokens))
                    written += 1
        seconds = time.perf_counter() - began
        print(json.dumps([written, seconds, time.process_time() - processor]), flush=True)
        for each in active:
            decoder.drop(each)


def spread(count: int, tokens: int) -> list[int]:
    """Lengths of the first answers, so that their ends do not coincide."""
    return [max(9, tokens * (at + 1) // count) for at in range(count)]


class Loop:
    """The worker, asked for windows."""

    def __init__(self, options: argparse.Namespace, draft: str):
        given = [options.target, draft, options.dtype, options.prompts]
        command = [sys.executable, __file__, "--worker", *given]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.prompts: list[list[int]] = json.loads(self._process.stdout.readline())

    def window(self, requests: int, tokens: int, seconds: float) -> Window:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"requests": requests, "tokens": tokens, "seconds": seconds}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Window(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


# --- a server ---


class Clients:
    """Clients of one server, each of which asks again when it was answered."""

    def __init__(self, url: str, process: int, prompts: Sequence[Sequence[int]], counter: str):
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._url, self._pid, self._counter = url, process, counter
        self._prompts = prompts
        self._model = json.loads(self._read("/v1/models"))["data"][0]["id"]
        self._first: list[float] = []
        self._between: list[float] = []
        self._begun = 0

    def window(self, requests: int, tokens: int, seconds: float) -> Window:
        return asyncio.run(self._window(requests, tokens, seconds))

    async def _window(self, requests: int, tokens: int, seconds: float) -> Window:
        coming, self._begun = itertools.cycle(self._prompts), 0
        clients = [asyncio.create_task(self._client(coming, limit, tokens)) for limit in spread(requests, tokens)]
        while self._begun < requests:
            if any(client.done() for client in clients):
                await asyncio.gather(*clients)
            await asyncio.sleep(0.01)
        self._first, self._between = [], []
        counted, began, processor = self._count(), time.perf_counter(), processor_seconds(self._pid)
        await asyncio.sleep(seconds)
        counted, ended = self._count() - counted, time.perf_counter()
        found = Window(
            counted, ended - began, processor_seconds(self._pid) - processor, (*self._first,), (*self._between,)
        )
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await asyncio.sleep(0.5)  # the server notices that they have gone
        return found

    async def _client(self, coming: Iterator[Sequence[int]], first: int, tokens: int) -> None:
        for turn in itertools.count():
            await self._ask(next(coming), tokens if turn else first, begins=not turn)

    async def _ask(self, prompt: Sequence[int], tokens: int, *, begins: bool) -> None:
        """One streamed answer. A client of few instructions: it runs on the cores that are measured."""
        asked = {"model": self._model, "prompt": list(prompt), "temperature": 0, "max_tokens": tokens, "stream": True}
        body = json.dumps(asked).encode()
        sent = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            if b" 200 " not in await reader.readline():
                raise RuntimeError((await reader.read()).decode(errors="replace"))
            last, arrivals = sent, 0
            async for line in reader:
                if not line.startswith(b"data: {") or b'"text":""' in line:
                    continue
                now, arrivals = time.perf_counter(), arrivals + 1
                (self._between if arrivals > 1 else self._first).append(now - last)
                last = now
                self._begun += begins and arrivals == 4
            self._begun += begins and arrivals < 4
        finally:
            writer.close()

    def _count(self) -> int:
        """Tokens generated since the server began."""
        lines = self._read("/metrics").splitlines()
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(self._counter)))

    def _read(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=30) as answer:
            return answer.read().decode()

    def close(self) -> None:
        pass


def processor_seconds(process: int) -> float:
    """User and system time of a process and all below it."""
    total = 0.0
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total = (int(fields[11]) + int(fields[12])) / CLOCK
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            total += sum(processor_seconds(int(child)) for child in children.read_text().split())
    return total


def nds_command(options: argparse.Namespace, draft: str, port: int) -> list[str]:
    command = [sys.executable, "-m", "nemotron_dspark", "serve", "-t", options.target, "--port", str(port)]
    command += ["--set", f"target.dtype={options.dtype}", "--set", "target.proofs=false"]
    command += ["--set", f"serve.max_batch_size={max(options.requests)}"]
    command += ["--set", f"serve.prefix_cache_gb={options.prefix_cache_gb}"]
    return [*command, "-d", draft] if draft else command


def vllm_command(options: argparse.Namespace, port: int) -> list[str]:
    command = [os.environ["NDS_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", options.target]
    command += ["--dtype", options.dtype, "--max-model-len", "1024", "--max-num-seqs", str(max(options.requests))]
    return [*command, "--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]


def report(name: str, windows: Sequence[Window], loop: Sequence[Window] | None) -> dict[str, Any]:
    """A row: medians over windows, latencies over all of them."""
    speeds = [each.tokens / each.seconds for each in windows]
    row: dict[str, Any] = {"name": name, "tokens_per_second": statistics.median(speeds), "speeds": speeds}
    row["processor_ms_per_token"] = 1e3 * sum(each.processor for each in windows) / sum(each.tokens for each in windows)
    if loop:
        bare = [each.tokens / each.seconds for each in loop]
        row["of_the_loop"] = statistics.median(one / other for one, other in zip(speeds, bare, strict=True))
    for key in ("first", "between"):
        values = sorted(value for each in windows for value in getattr(each, key))
        if values:
            row[key] = [1e3 * values[len(values) // 2], 1e3 * values[min(len(values) - 1, int(0.99 * len(values)))]]
    return row


def show(requests: int, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{requests} at once{'':14}tokens/s  (windows){'':14}of the loop  cpu ms/token   first ms     between ms")
    for row in rows:
        speeds = " ".join(f"{speed:.1f}" for speed in row["speeds"])
        share = f"{row['of_the_loop']:.2f}" if "of_the_loop" in row else ""
        pairs = ["{:.0f} / {:.0f}".format(*row[key]) if key in row else "" for key in ("first", "between")]
        speed, processor = row["tokens_per_second"], row["processor_ms_per_token"]
        print(f"{row['name']:24}{speed:8.1f}  {speeds:24}{share:>10}{processor:14.1f}{pairs[0]:>15}{pairs[1]:>13}")
    sys.stdout.flush()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", default="", help="folder of a draft; everything is measured without one, too")
    parser.add_argument("--prompts", default="", help="JSON lines, as nds eval takes them")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", default="1,8,32", type=lambda text: [int(each) for each in text.split(",")])
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each system")
    parser.add_argument("--only", choices=("plain", "draft"), help="with the draft or without it alone")
    parser.add_argument("--prefix-cache-gb", type=float, default=0.0, help="serve.prefix_cache_gb of nds serve")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    systems: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind, draft in [("plain", ""), *([("draft", options.draft)] if options.draft else [])]:
            if options.only not in (None, kind):
                continue
            loop = systems[f"loop, {kind}"] = Loop(options, draft)
            stack.callback(loop.close)
            port = free_port()
            server = running(nds_command(options, draft, port), port, folder / f"nds-{kind}.log")
            url = stack.enter_context(server)
            systems[f"nds serve, {kind}"] = Clients(url, _listener(port), loop.prompts, "nds_generated_tokens_total")
        if "NDS_VLLM_PYTHON" in os.environ:
            port = free_port()
            environment = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
            url = stack.enter_context(running(vllm_command(options, port), port, folder / "vllm.log", environment))
            systems["vllm, plain"] = Clients(url, _listener(port), loop.prompts, "vllm:generation_tokens_total{")
        results = {}
        for requests in options.requests:
            windows: dict[str, list[Window]] = {name: [] for name in systems}
            for _ in range(options.rounds):
                for name, system in systems.items():
                    windows[name].append(system.window(requests, options.tokens, options.seconds))
            loops = {kind: windows.get(f"loop, {kind}") for kind in ("plain", "draft")}
            results[requests] = [
                report(name, found, None if name.startswith("loop") else loops[name.rpartition(" ")[2]])
                for name, found in windows.items()
            ]
            if not options.json:
                show(requests, results[requests])
        if options.json:
            print(json.dumps(results))


def _listener(port: int) -> int:
    """The process of ours that listens on ``port``."""
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    )
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == f"socket:[{inode}]":
                return int(link.parts[2])
    raise RuntimeError(f"nobody listens on port {port}")


if __name__ == "__main__":
    main()
