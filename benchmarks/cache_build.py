"""How much of the target's bare forward a cache build keeps: useful tokens per second, as ratios of one run.

A random Nemotron-H and conversations of mixed length (log-normal, some 64 to 1024 tokens). The rows:

- ideal: the backbone alone, no head, no taps, no padding: as many tokens as the data has in batches of equal length, of
  the shape that is fastest, run as `Target.capture` runs it.
- transformers: the same as the model runs by itself, of the shape that is fastest then.
- plain loop: tokenise, then batches of 32 in file order, padded to the longest, with a mask, by the model itself with
  `output_hidden_states`; after each batch its samples are written. One after the other; half of the data, once.
- build: `build_cache`, from JSON lines to a finished cache. The target is loaded before, as for the other rows.
- 2 processes: the same with a helper, from when the helper has its target; its ideal is two processes at once.

The target runs on one thread, as it would on one GPU; what goes on beside it has the other core. The ideal is run
before and after every row, so that what else the machine does falls on both; the ratios are medians over repetitions.
Processor time is that of all threads and processes: it shows what overlapping hides.

    python benchmarks/cache_build.py [--tokens 20000] [--repetitions 5] [--json]
"""

import argparse
import functools
import itertools
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.cache.deepspec_layout import DeepSpecLayout
from nemotron_dspark.cache.layout import WORK
from nemotron_dspark.cache.writer import CacheWriter
from nemotron_dspark.cli.shell import quiet_libraries
from nemotron_dspark.config.run import CacheConfig, DataConfig
from nemotron_dspark.data.conversations import Skipped
from nemotron_dspark.data.samples import read_samples
from nemotron_dspark.folders import locked
from nemotron_dspark.processes import process_pool, share
from nemotron_dspark.targets import Target

PATTERN, HIDDEN, TAPS = "M-M-*-M-M-*-", 256, (1, 5, 9)
DATA = DataConfig(max_length=1024)
CACHE = CacheConfig(shard_bytes=8 * 1024**2, batch_tokens=1024)  # some ten shards; forwards as large as the ideal's
SHAPES = tuple((rows, length) for length in (256, 512) for rows in (1, 2, 4, 8))  # of the ideal
PLAIN_ROWS = 32


def make_target(folder: Path, words: list[str]) -> Path:
    from nemotron_dspark.recipe.tiny import make_tokenizer, nemotron_h_config, random_model, save_target

    shape = {"num_attention_heads": 4, "head_dim": 64, "mamba_num_heads": 8, "mamba_head_dim": 64, "chunk_size": 128}
    config = nemotron_h_config(PATTERN, vocab_size=4096, hidden_size=HIDDEN, ssm_state_size=64, **shape)
    return save_target(folder, random_model(config), make_tokenizer([" ".join(words)] * 2, 4096))


def make_conversations(path: Path, words: list[str], tokens: int) -> Path:
    chance, written = random.Random(0), 0
    with open(path, "w") as file:
        while written < tokens:
            count = min(1000, max(48, int(chance.lognormvariate(5.4, 0.7))))
            text = chance.choices(words, k=count)
            turns = [
                {"role": "user", "content": " ".join(text[:16])},
                {"role": "assistant", "content": " ".join(text[16:])},
            ]
            file.write(json.dumps({"conversations": turns}) + "\n")
            written += count
    return path


class Clock:
    """Wall and processor seconds since it was made; processes that have ended count."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), _processor_seconds()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, _processor_seconds() - self._processor


def _processor_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


class Ideal:
    """Forwards without padding, in the shape that is fastest."""

    def __init__(self, run: Callable[[torch.Tensor], Any], shapes: tuple[tuple[int, int], ...] = SHAPES):
        self._run = run
        self.shape = min(shapes, key=lambda shape: min(self._seconds(shape) for _ in range(3)))

    def _seconds(self, shape: tuple[int, int]) -> float:
        ids = torch.randint(32, 4096, shape)
        began = time.process_time()
        self._run(ids)
        return (time.process_time() - began) / ids.numel()

    def __call__(self, tokens: int) -> tuple[float, float]:
        """Wall and processor seconds of one token, from some ``tokens``."""
        rows, length = self.shape
        count = max(1, round(tokens / rows / length))
        clock = Clock()
        for _ in range(count):
            self._run(torch.randint(32, 4096, self.shape))
        wall, processor = clock.read()
        return wall / (count * rows * length), processor / (count * rows * length)


def bare(target: Target) -> Callable[[torch.Tensor], Any]:
    return lambda ids: target.capture(ids, None, ())


def by_itself(target: Target) -> Callable[[torch.Tensor], Any]:
    return torch.no_grad()(lambda ids: target.model.model(input_ids=ids, use_cache=False))


@torch.no_grad()
def plain_loop(target: Target, conversations: Path, count: int, folder: Path) -> None:
    """What one would write down first, for the first ``count`` samples."""
    found = read_samples(conversations, target.tokenizer, DATA)
    samples = list(itertools.islice((item.tokens for item in found if not isinstance(item, Skipped)), count))
    lengths = [len(sample.input_ids) for sample in samples]
    layout = DeepSpecLayout.of(lengths, taps=TAPS, hidden_size=HIDDEN, shard_bytes=CACHE.shard_bytes)
    with locked(folder / WORK), CacheWriter(folder, layout) as writer:
        for first in range(0, len(samples), PLAIN_ROWS):
            rows = samples[first : first + PLAIN_ROWS]
            ids = torch.zeros(len(rows), max(lengths[first : first + PLAIN_ROWS]), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, sample in enumerate(rows):
                ids[row, : len(sample.input_ids)] = torch.from_numpy(sample.input_ids)
                mask[row, : len(sample.input_ids)] = 1
            output = target.model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
            taps = torch.cat([output.hidden_states[tap + 1] for tap in TAPS], dim=-1)
            written = {}
            for row, sample in enumerate(rows):
                length = len(sample.input_ids)
                states = taps[row, :length], output.last_hidden_state[row, :length]
                written[first + row] = writer.files.write(first + row, sample.input_ids, sample.loss_mask, *states)
            writer.commit(written)
        writer.finish()


def build(target: Any, conversations: Path, folder: Path, **helpers: Any) -> None:
    build_cache(target, conversations, folder, taps=TAPS, data=DATA, cache=CACHE, **helpers)


class WaitingForHelper:
    """A target whose first forward waits for the helper's; its clock begins then."""

    def __init__(self, target: Target, ready: Path):
        self._target = target
        self._ready = ready
        self.clock: Clock | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def captures(self, *given: Any) -> Any:
        if self.clock is None:
            while not self._ready.exists():
                time.sleep(0.01)
            self._before = float(self._ready.read_text())
            self.clock = Clock()
        return self._target.captures(*given)

    def read(self) -> tuple[float, float]:
        """Without what the helper did before; it has ended."""
        wall, processor = self.clock.read()
        return wall, processor - self._before


def ready_helper(folder: str, ready: Path) -> Target:
    quiet_libraries()
    target = Target.load(folder)
    ready.with_suffix(".part").write_text(str(time.process_time()))
    ready.with_suffix(".part").rename(ready)
    return target


@functools.cache
def second_ideal() -> Ideal:
    """Of the process that a pool runs this in."""
    quiet_libraries()
    folder, shape = share()
    return Ideal(bare(Target.load(folder)), (shape,))


def second_seconds(tokens: int) -> tuple[float, float]:
    return second_ideal()(tokens)


def measure(folder: Path, tokens: int, repetitions: int) -> dict[str, Any]:
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 7))) for _ in range(2000)]
    where = make_target(folder / "target", words)
    conversations = make_conversations(folder / "data.jsonl", words, tokens)
    target = Target.load(str(where))
    found = [item for item in read_samples(conversations, target.tokenizer, DATA) if not isinstance(item, Skipped)]
    lengths = [len(item.tokens.input_ids) for item in found]
    tokens = sum(lengths)
    ideal, by_model = Ideal(bare(target)), Ideal(by_itself(target))
    seconds: dict[str, list[tuple[float, float]]] = {}  # wall and processor, for a token
    ratios: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, count: int, taken: tuple[float, float], *ideals: tuple[float, float]) -> None:
        """A row took ``taken`` for ``count`` tokens; ``ideals`` are the ideal's times of a token before and after."""
        a_token = taken[0] / count, taken[1] / count
        seconds.setdefault(name, []).append(a_token)
        best = [statistics.mean(part) for part in zip(*ideals, strict=True)]
        ratios.setdefault(name, []).append((best[0] / a_token[0], best[1] / a_token[1]))

    def timed(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
        clock = Clock()
        work(*arguments)
        return clock.read()

    def alone() -> tuple[float, float]:
        return ideal(tokens // 4)

    with process_pool(1, (str(where), ideal.shape)) as second:
        second.submit(second_seconds, 1).result()

        def both() -> tuple[float, float]:
            running = second.submit(second_seconds, tokens // 8)
            mine, other = ideal(tokens // 8), running.result()
            return max(mine[0], other[0]) / 2, (mine[1] + other[1]) / 2

        for repetition in range(repetitions):
            new = folder / f"run{repetition}"
            before = alone()
            quarter = by_model(tokens // 4)
            after = alone()
            note("transformers", 1, quarter, before, after)
            if repetition == 0:  # four times as long as the others
                part = lengths[: PLAIN_ROWS * max(1, len(lengths) // PLAIN_ROWS // 2)]
                row = timed(plain_loop, target, conversations, len(part), new / "plain")
                before, after = after, alone()
                note("plain loop", sum(part), row, before, after)
            row = timed(build, target, conversations, new / "build")
            before, after = after, alone()
            note("build", tokens, row, before, after)
            note("ideal", 1, before, before)
            before = both()
            waiting = WaitingForHelper(target, new / "ready")
            helper = functools.partial(ready_helper, str(where), new / "ready")
            build(waiting, conversations, new / "two", helpers=[helper])
            note("2 processes", tokens, waiting.read(), before, both())
            same = all(
                path.read_bytes() == (new / "two" / path.name).read_bytes() for path in (new / "build").iterdir()
            )
    rows = []
    for name in ("ideal", "transformers", "plain loop", "build", "2 processes"):
        wall, processor = (statistics.median(values) for values in zip(*ratios[name], strict=True))
        rate = 1 / statistics.median(wall for wall, _ in seconds[name])
        spread = [pick(wall for wall, _ in ratios[name]) for pick in (min, max)]
        rows.append({"name": name, "tokens_per_s": rate, "ratio": wall, "spread": spread, "processor_ratio": processor})
    return {
        "layers": PATTERN,
        "hidden_size": HIDDEN,
        "parameters": sum(parameter.numel() for parameter in target.model.parameters()),
        "samples": len(lengths),
        "tokens": tokens,
        "shortest": min(lengths),
        "longest": max(lengths),
        "ideal_shape": ideal.shape,
        "transformers_shape": by_model.shape,
        "same_bytes": same,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="of the conversations, about (default 20000)")
    parser.add_argument("--repetitions", type=int, default=5, help="of every row (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.tokens, options.repetitions)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['layers']}, hidden {HIDDEN}, {found['parameters'] / 1e6:.1f} M parameters, one thread")
    lengths = f"{found['shortest']} to {found['longest']} tokens"
    print(f"{found['samples']} samples of {lengths}, {found['tokens']:,} in all; ideal batches {found['ideal_shape']}")
    print(f"{'':14}{'tokens/s':>10}{'of the ideal':>14}{'lowest-highest':>16}{'by processor':>14}")
    for row in found["rows"]:
        spread = "{:.2f}-{:.2f}".format(*row["spread"])
        numbers = f"{row['tokens_per_s']:10,.0f}{row['ratio']:14.2f}{spread:>16}{row['processor_ratio']:14.2f}"
        print(f"{row['name']:14}{numbers}")
    print(f"two processes write the same bytes as one: {found['same_bytes']}")


if __name__ == "__main__":
    main()
