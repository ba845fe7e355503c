"""The accepted length of a draft in llama.cpp's server beside ours, on the same prompts and token ids.

Target and draft are exported as GGUF, served once with the draft and once without, with the flags that `nds engine`
prints, and asked one prompt at a time, greedily. Said are both accepted lengths, tokens gained a pass of the target and
how many answers are the same with and without the draft. Near the limit of an answer llama.cpp cuts the draft and
`nds eval` does not, as DeepSpec: tokens a pass is free of that, accepted length is not.

    python benchmarks/engines.py --target T --draft D --prompts P [--llama-server PATH] [--tokens 192] [--dtype float32]
"""

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nemotron_dspark import stages
from nemotron_dspark.config import RunConfig, load_config
from nemotron_dspark.engines import commands
from nemotron_dspark.engines.measure import EngineEvaluation, evaluate_engine
from nemotron_dspark.engines.pair import Pair

START_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One pair, here and in llama.cpp."""

    ours: float  # accepted length
    theirs: float
    our_tokens_a_pass: float  # tokens written but the first, over passes of the target
    their_tokens_a_pass: float
    their_slots: tuple[float, ...]  # share of rounds that kept each slot
    our_slots: tuple[float, ...]
    identical: int  # llama.cpp's greedy answers with the draft that equal those without
    lossless: int  # ours
    prompts: int


def export(target: Path, draft: Path, folder: Path, dtype: str) -> None:
    """Both files in ``folder``, by the commands that `nds engine llamacpp` prints."""
    folder.mkdir(parents=True, exist_ok=True)
    nds = [sys.executable, "-m", "nemotron_dspark", "export", "--to", "gguf", "--target", str(target), "--dtype", dtype]
    for name, more in zip(commands.GGUF_FILES, ([], ["--draft", str(draft)]), strict=True):
        if not (folder / name).exists():
            subprocess.run([*nds, *more, "--out", str(folder / name)], check=True)


@contextlib.contextmanager
def running(argv: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a server while the block runs; ``environment`` is added to ours."""
    url = f"http://127.0.0.1:{port}"
    with open(log, "wb") as file:
        server = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {}))
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{argv[0]} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def in_llama_cpp(
    config: RunConfig, draft: Path, prompts: Path, folder: Path, server: str, dtype: str, threads: int = 1
) -> EngineEvaluation:
    """Measure the draft in llama.cpp, whose two files are made in ``folder``."""
    export(Path(config.target.named), draft, folder, dtype)
    pair = Pair.of(config.target, draft)
    ports = free_port(), free_port()
    first, second = (
        commands.engine_command("llamacpp", pair, machine="cpu", requests=1, port=port, gguf=folder) for port in ports
    )
    alone = [part for flag in second.flags if "spec" not in flag.name for part in (flag.name, flag.value) if part]
    with_draft = [server, *first.argv[1:], "--threads", str(threads)]
    without = [server, "--model", str(folder / commands.GGUF_FILES[0]), *alone, "--threads", str(threads)]
    with (
        running(with_draft, ports[0], folder / "speculative.log") as url,
        running(without, ports[1], folder / "plain.log") as plain,
    ):
        return evaluate_engine(config, url, prompts, plain_url=plain)


def compare(
    config: RunConfig, draft: Path, prompts: Path, folder: Path, server: str, dtype: str = "float32"
) -> Comparison:
    """One pair, measured here and in llama.cpp; ``config.eval`` says how many tokens."""
    theirs = in_llama_cpp(config, draft, prompts, folder, server, dtype)
    ours = stages.evaluate(config, draft, prompts).evaluation
    mine, its = ours.measurements[0], theirs.measurements[0]
    assert theirs.plain is not None
    # A last token that is left to write is written by a pass without a draft, which only llama.cpp's answers tell of.
    passes = its.tokens - its.prompts - (its.accepted_length - 1) * its.rounds
    return Comparison(
        ours=mine.accepted_length,
        theirs=its.accepted_length,
        our_tokens_a_pass=(mine.tokens - mine.prompts) / mine.rounds,
        their_tokens_a_pass=(its.tokens - its.prompts) / max(passes, its.rounds),
        their_slots=its.per_position,
        our_slots=mine.per_position,
        identical=theirs.plain.identical,
        lossless=ours.lossless.identical,
        prompts=its.prompts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--llama-server", default=os.environ.get("NDS_LLAMACPP", "llama-server"))
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    config = load_config(
        {"name": given.target, "dtype": given.dtype},
        eval={"max_new_tokens": given.tokens, "temperatures": [0.0]},
    )
    with tempfile.TemporaryDirectory() as folder:
        found = compare(config, given.draft, given.prompts, Path(folder), given.llama_server, given.dtype)
    if given.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(f"{'':24}{'nds':>8}{'llama.cpp':>12}")
    print(f"{'accepted length':24}{found.ours:8.3f}{found.theirs:12.3f}")
    print(f"{'tokens a pass':24}{found.our_tokens_a_pass:8.3f}{found.their_tokens_a_pass:12.3f}")
    print(f"{'same as without a draft':24}{found.lossless:8}{found.identical:12}  of {found.prompts}")


if __name__ == "__main__":
    main()
