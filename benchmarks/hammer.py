"""Whether `nds serve` comes back to rest under load and attack: bursts of requests of four kinds.

A quarter are answered whole, a quarter streamed, a quarter leave after 5 to 300 ms, a quarter are hostile bodies
(`tests/serving/hostile.py`). After each burst, once nothing is active, printed are the answers by status and the
server's resident memory, open files and threads. It serves a tiny random hybrid with a draft, on 127.0.0.1.

    python benchmarks/hammer.py [--bursts 5] [--requests 100]
"""

import argparse
import asyncio
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nemotron_dspark.config.run import DraftSection
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.recipe import tiny
from nemotron_dspark.targets import Target
from tests.serving import hostile


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    """A server of a tiny pair, and its base URL."""
    target = Target.load(str(tiny.random_target(folder / "target", pattern="M*-M")))
    section = DraftSection(num_layers=1, block_size=4, taps=[0, 1], markov_rank=8)
    DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=0).save(folder / "draft", slim=True)
    command = [sys.executable, "-m", "nemotron_dspark", "serve", "-t", target.folder, "-d", folder / "draft"]
    command += ["--port", "0", "--json", "--set", "serve.max_queue=64"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    return server, json.loads(server.stdout.readline())["url"]


async def ask(client: httpx.AsyncClient, number: int) -> int | str:
    """One request; its status, or that the client left."""
    chance, kind = random.Random(number), number % 4
    body = {"prompt": "The state " * chance.randint(1, 30), "max_tokens": chance.randint(1, 60)}
    if kind == 0:
        return (await client.post("/completions", json=body)).status_code
    if kind == 1:
        async with client.stream("POST", "/completions", json=body | {"stream": True}) as answer:
            async for _ in answer.aiter_lines():
                pass
            return answer.status_code
    if kind == 2:
        long = body | {"max_tokens": 1500, "stream": number % 8 == 2}
        try:
            return (
                await asyncio.wait_for(client.post("/completions", json=long), chance.choice((0.005, 0.05, 0.3)))
            ).status_code
        except (TimeoutError, httpx.HTTPError):
            return "left"
    path, raw, content_type = next(hostile.bodies(1, number))
    return (await client.post(path, content=raw, headers={"Content-Type": content_type})).status_code


async def burst(url: str, numbers: range) -> list[int | str]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(ask(client, number) for number in numbers))


def held(process: int) -> str:
    """Resident memory, open files and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return f"{int(lines['VmRSS'].split()[0]) / 1024:.0f} MiB, {files} files, {lines['Threads'].strip()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="of each burst")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, url = start(Path(folder))
        try:
            print("at first", held(server.pid), sep="\t")
            for first in range(0, options.bursts * options.requests, options.requests):
                told = collections.Counter(asyncio.run(burst(url, range(first, first + options.requests))))
                deadline = time.monotonic() + 60
                while (health := httpx.get(url.removesuffix("v1") + "health").json())["active"] + health["waiting"]:
                    if time.monotonic() > deadline:
                        sys.exit(f"not at rest after a minute: {health}")
                    time.sleep(0.05)
                by_status = ", ".join(f"{status}: {count}" for status, count in sorted(told.items(), key=str))
                print(by_status, held(server.pid), sep="\t", flush=True)
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
