"""Whether `nds serve` comes back to rest under load and attack: bursts of requests of four kinds.

A quarter are answered whole, a quarter streamed, a quarter leave after 5 to 300 ms, a quarter are hostile bodies
(`tests/serving/hostile.py`). Printed are the answers of each burst by status, the largest memory meanwhile, and, once
nothing is active, the server's memory, open files and threads; memory is what is resident and no file backs. It serves
a tiny random hybrid with a draft, or what is given, on 127.0.0.1.

    python benchmarks/hammer.py [--bursts 5] [--requests 100] [--words 90] [--target T --draft D] [--prefix-cache-gb 1]
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
from nemotron_dspark.serving.engine import REST_SECONDS
from nemotron_dspark.targets import Target
from tests.serving import hostile


def tiny_pair(folder: Path) -> tuple[str, str]:
    """Folders of a tiny target and its draft."""
    target = Target.load(str(tiny.random_target(folder / "target", pattern="M*-M")))
    section = DraftSection(num_layers=1, block_size=4, taps=[0, 1], markov_rank=8)
    DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=0).save(folder / "draft", slim=True)
    return str(target.folder), str(folder / "draft")


def start(target: str, draft: str, prefix_cache_gb: float) -> tuple[subprocess.Popen, str]:
    """A server, and its base URL."""
    command = [sys.executable, "-m", "nemotron_dspark", "serve", "-t", target, *(["-d", draft] if draft else [])]
    command += ["--port", "0", "--json", "--set", "serve.max_queue=64"]
    command += ["--set", f"serve.prefix_cache_gb={prefix_cache_gb}"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    return server, json.loads(server.stdout.readline())["url"]


async def ask(client: httpx.AsyncClient, number: int, words: int) -> int | str:
    """One request; its status, or that the client left."""
    chance, kind = random.Random(number), number % 4
    body = {
        "prompt": f"{number} " + "The state of " * chance.randint(1, max(1, words // 3)),
        "max_tokens": chance.randint(1, 60),
    }
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


async def burst(url: str, numbers: range, words: int, process: int) -> tuple[list[int | str], int]:
    """What each was told, and the largest memory meanwhile."""
    largest, limits = 0, httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        told = asyncio.gather(*(ask(client, number, words) for number in numbers))
        while not told.done():
            await asyncio.wait([told], timeout=0.05)
            largest = max(largest, resident(process))
        return await told, largest


def status(process: int) -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())


def resident(process: int) -> int:
    """MiB of resident memory that no file backs."""
    return int(status(process)["RssAnon"].split()[0]) // 1024


def held(process: int) -> str:
    """Memory, open files and threads of a process."""
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return f"{resident(process)} MiB, {files} files, {status(process)['Threads'].strip()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="of each burst")
    parser.add_argument("--words", type=int, default=90, help="of a prompt, at most")
    parser.add_argument("--target")
    parser.add_argument("--draft", default="")
    parser.add_argument("--prefix-cache-gb", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = (options.target, options.draft) if options.target else tiny_pair(Path(folder))
        server, url = start(*pair, options.prefix_cache_gb)
        try:
            print("at first", held(server.pid), sep="\t")
            for first in range(0, options.bursts * options.requests, options.requests):
                numbers = range(first, first + options.requests)
                answers, largest = asyncio.run(burst(url, numbers, options.words, server.pid))
                deadline = time.monotonic() + 60
                while (health := httpx.get(url.removesuffix("v1") + "health").json())["active"] + health["waiting"]:
                    if time.monotonic() > deadline:
                        sys.exit(f"not at rest after a minute: {health}")
                    time.sleep(0.05)
                time.sleep(2 * REST_SECONDS)
                told = sorted(collections.Counter(answers).items(), key=str)
                by_status = ", ".join(f"{each}: {count}" for each, count in told)
                print(by_status, f"up to {largest} MiB, then {held(server.pid)}", sep="\t", flush=True)
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
