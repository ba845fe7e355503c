"""What a schedule gains and loses against whole blocks and against no draft, by load and by workload.

Four decoders of one target answer the same requests: without a draft, with whole blocks (`off`), with `threshold` and
with `cost`. They take turns of a few rounds, the one that has had least time next, so that whatever else the machine
does slows all alike. Counted are the rounds (not reading prompts): tokens a second by the clock, and by the
processor's time. "of the best" is a schedule's speed in that of the better of no draft and whole blocks.

- 1, 8, 32: so many requests at a time; when one ends the next begins.
- emptying: the largest number of requests at once, of 1/8 to all of the tokens, and no new ones: from full to one.

Workloads: greedy, sampled at temperature 1, and mixed, every other request sampled.

    nds profile --target T --draft D
    python benchmarks/schedule.py --target T --draft D --prompts P [--rows 1,8,32] [--tokens 64] [--threads 2] [--json]

On a machine that others use, `--processor-time` with one thread counts processor time alone, in place of the clock
everywhere: rounds are profiled so first, for `--profile-seconds`, and the ratios are its.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.decoding.decoder import Decoder, Generation
from nemotron_dspark.decoding.pair import load_pair
from nemotron_dspark.decoding.sampling import Sampling
from nemotron_dspark.decoding.schedule import schedule_for
from nemotron_dspark.evaluation.measure import prompt_ids
from nemotron_dspark.evaluation.profile import measure_costs

TURN = 4  # rounds
SIDES = ("plain", "whole", "threshold", "cost")
WORKLOADS = {"greedy": (0.0,), "sampled": (1.0,), "mixed": (0.0, 1.0)}
Request = tuple[Sequence[int], Sampling]


class Side:
    """One decoder with its requests."""

    def __init__(self, decoder: Decoder, requests: Sequence[Request], rows: int):
        self.decoder, self.waiting, self.rows = decoder, list(reversed(requests)), rows
        self.active: list[Generation] = []
        self.seconds = self.processor = 0.0
        self.tokens = self.rounds = self.drafted = 0

    def turn(self) -> bool:
        """A few rounds; False when all requests are answered."""
        for _ in range(TURN):
            while self.waiting and len(self.active) < self.rows:
                ids, sampling = self.waiting.pop()
                self.active.append(self.decoder.start(ids, sampling, frozenset()))
            before = sum(len(each.tokens) for each in self.active)
            clock, processor = time.perf_counter(), time.process_time()
            self.decoder.step(self.active)
            self.seconds += time.perf_counter() - clock
            self.processor += time.process_time() - processor
            self.tokens += sum(len(each.tokens) for each in self.active) - before
            self.rounds += 1
            self.drafted += max((each.proposed[-1] for each in self.active if each.proposed), default=0)
            for each in self.active:
                if each.finished:
                    self.decoder.drop(each)
            self.active = [each for each in self.active if not each.finished]
            if not self.active and not self.waiting:
                return False
        return True


def run(decoders: dict[str, Decoder], requests: Sequence[Request], rows: int) -> dict[str, Side]:
    """All sides answer ``requests``, ``rows`` at a time."""
    sides = {name: Side(decoder, requests, rows) for name, decoder in decoders.items()}
    running = dict(sides)
    while running:
        name = min(running, key=lambda each: running[each].processor)
        if not running[name].turn():
            del running[name]
    return sides


def requests_of(prompts: Sequence[Sequence[int]], workload: str, lengths: Sequence[int]) -> list[Request]:
    """One of each of ``lengths`` tokens, the workload's temperatures in turn."""
    temperatures = WORKLOADS[workload]
    return [
        (
            prompts[at % len(prompts)],
            Sampling(temperature=temperatures[at % len(temperatures)], seed=at, max_new_tokens=length),
        )
        for at, length in enumerate(lengths)
    ]


def told(sides: dict[str, Side]) -> dict[str, Any]:
    """What the sides did, beside each other."""
    speeds = {
        "clock": {name: side.tokens / side.seconds for name, side in sides.items()},
        "processor": {name: side.tokens / side.processor for name, side in sides.items()},
    }
    best = {by: max(each["plain"], each["whole"]) for by, each in speeds.items()}
    return {
        "tokens_per_second": speeds,
        "of_best": {by: {name: each[name] / best[by] for name in SIDES[2:]} for by, each in speeds.items()},
        "tokens_a_round": {name: side.tokens / side.rounds for name, side in sides.items()},
        "drafted": {name: side.drafted / side.rounds for name, side in sides.items()},
    }


def show(row: dict[str, Any], by: str) -> None:
    speeds, share, drafted = row["tokens_per_second"][by], row["of_best"], row["drafted"]
    print(f"{row['load']:<10}{row['workload']:<10}" + "".join(f"{speeds[name]:>10.1f}" for name in SIDES), end="")
    print("".join(f"{share[by][name]:>{24 if at == 0 else 10}.3f}" for at, name in enumerate(SIDES[2:])), end="")
    print(f"{share['processor']['threshold']:>8.3f}{share['processor']['cost']:>8.3f}", end="")
    print(f"{drafted['threshold']:>20.2f}{drafted['cost']:>6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--profile", type=Path, help="the draft's own, if not given")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="at least, at each number of rows")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--threshold", type=float, help="of serve.schedule=threshold, if not its own")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor-time", action="store_true", help="profile and compare by it, with one thread")
    parser.add_argument("--profile-seconds", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads or args.processor_time:
        torch.set_num_threads(1 if args.processor_time else args.threads)
    target, draft = load_pair(TargetConfig(name=args.target, proofs=False), args.draft)
    prompts = prompt_ids(target, args.prompts, new_tokens=args.tokens)
    counts = [int(text) for text in args.rows.split(",")]
    if args.processor_time:
        context = sum(map(len, prompts)) // len(prompts) + args.tokens // 2
        given = {"rows": counts, "context": context, "seconds": args.profile_seconds, "clock": time.thread_time}
        draft.costs = measure_costs(target, draft, draft.config.block_size, **given).costs
        if not args.json:
            for rows in counts:
                print(f"a round of {rows}, ms:", *(f"{1e3 * each:.1f}" for each in draft.costs.rounds(rows)))
    # Made once for the whole run, as a server's is: what was learnt of one workload is there when the next begins.
    threshold = "threshold" if args.threshold is None else f"threshold:{args.threshold}"
    decoders = {
        "plain": Decoder(target),
        "whole": Decoder(target, draft),
        "threshold": Decoder(target, draft, schedule=schedule_for(threshold, draft)),
        "cost": Decoder(target, draft, schedule=schedule_for("cost", draft, args.profile)),
    }
    for decoder in decoders.values():
        decoder.generate(prompts[0], Sampling(temperature=0.0, max_new_tokens=16))
    found: list[dict[str, Any]] = []
    if not args.json:
        print(f"{'load':<10}{'workload':<10}" + "".join(f"{name:>10}" for name in SIDES), end="")
        print("  of the best: threshold      cost   (by processor)   drafted: threshold  cost")
    for load in [*map(str, counts), "emptying"]:
        for workload in args.workloads.split(","):
            rows = max(counts) if load == "emptying" else int(load)
            if load == "emptying":
                lengths = [max(1, args.tokens * (1 + at % 8) // 8) for at in range(rows)]
            else:
                lengths = [args.tokens] * max(args.requests, rows)
            row = {"load": load, "workload": workload}
            row |= told(run(decoders, requests_of(prompts, workload, lengths), rows))
            found.append(row)
            if not args.json:
                show(row, "processor" if args.processor_time else "clock")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
