"""A draft for a fine-tuned target: from the draft of the target before, or from random weights.

    nds demo --out runs/demo
    python benchmarks/warm_start.py runs/demo [--steps 700] [--further 150] [--seeds 42,43]

The demo's target goes on training on other text (modules of Python's library about networks), of which some modules
are held back. On the new target's own answers to that text a fresh draft trains for N and for N/3 steps, and one that
`train.init` starts from the demo's draft for N/3. All are measured on prompts of the modules held back: accepted length
± standard error over the prompts, greedy and at temperature 1. The row of 0 steps is the demo's draft on the new
target. What is in the folder's `warm-start/` is not made again.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nemotron_dspark import stages
from nemotron_dspark.config import EvalConfig, RunConfig, load_config
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.evaluation.measure import measure, prompt_ids
from nemotron_dspark.recipe import tiny
from nemotron_dspark.recipe.corpus import HELD_OUT, passages, sources, write_prompts
from nemotron_dspark.recipe.demo import Budget, answer_prompts, build_demo_cache
from nemotron_dspark.recipe.demo_target import LENGTH, PEAK_LR, fit, token_stream
from nemotron_dspark.recipe.progress import Progress
from nemotron_dspark.targets import Target

OTHER = (
    "ftplib", "http/client", "http/cookies", "http/server", "imaplib", "logging/handlers", "mailbox", "smtplib", "ssl",
    "urllib/parse", "urllib/request", "email/header", "email/message",
)  # fmt: skip
OTHER_HELD_OUT = ("poplib", "http/cookiejar", "urllib/robotparser", "xmlrpc/client")
NEW_TOKENS = 64


def main() -> None:
    options = arguments()
    out, run = options.demo / "warm-start", options.run or options.demo / "run"
    out.mkdir(exist_ok=True)
    if not (out / "target" / "config.json").is_file():
        further(options.demo / "target", out / "target", options.further)
    target = data(out, settings(run, out / "target"), Budget(train_prompts=options.prompts))
    held_out = write_prompts(out / "held_out.jsonl", OTHER_HELD_OUT, options.measured, 2)
    ids, found = prompt_ids(target, held_out, new_tokens=NEW_TOKENS), {}
    for seed in options.seeds:
        for name, count, init in (
            ("the old draft", 0, run / "draft"),
            ("random weights", options.steps // 3, None),
            ("random weights", options.steps, None),
            ("the old draft", options.steps // 3, run / "draft"),
        ):
            draft = train(run, out, count, seed, init) if count else run / "draft"
            found.setdefault((name, count), []).append(measured(target, draft, ids))
            report(f"from {name}, {count} steps, seed {seed}", found[name, count][-1])
    print("| starts from | steps | greedy | temperature 1 |\n|---|---|---|---|")
    for (name, count), rows in found.items():
        lengths = (f"{over(rows, at):.2f} ± {over(rows, at + 1) / len(rows) ** 0.5:.2f}" for at in (0, 2))
        print(f"| {name} | {count} | {' | '.join(lengths)} |")


def further(source: Path, out: Path, steps: int) -> None:
    """Go on training the target in ``source`` on the other text, at half the rate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    held = {
        name: token_stream(tokenizer, passages(sources(modules), 300, 3))
        for name, modules in (("old text", HELD_OUT), ("other text", OTHER_HELD_OUT))
    }
    before = {name: loss(model, stream) for name, stream in held.items()}
    fit(model.train(), token_stream(tokenizer, passages(sources(OTHER), 12_000, 0)), steps, peak_lr=PEAK_LR / 2)
    after = {name: loss(model.eval(), stream) for name, stream in held.items()}
    report("target's loss on modules that it has not seen, before and after", [before, after])
    tiny.save_target(out, model, tokenizer)


@torch.no_grad()
def loss(model, stream: torch.Tensor) -> float:
    pieces = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)[:64]
    return model(input_ids=pieces, labels=pieces, use_cache=False).loss.item()


def data(out: Path, config: RunConfig, budget: Budget) -> Target:
    """The new target, with a cache of its answers to prompts of the other text."""
    target = stages.load_target(config)
    if not (out / "conversations.jsonl").is_file():
        write_prompts(out / "prompts.jsonl", OTHER, budget.train_prompts, 1)
        answer_prompts(target, out, config, budget, Progress())
    if not (out / "cache" / "manifest.json").is_file():
        build_demo_cache(target, out, config, Progress())
    return target


def train(run: Path, out: Path, steps: int, seed: int, init: Path | None) -> Path:
    """A draft trained on the new target's cache, with the settings of the old draft's run."""
    folder = out / f"{'fresh' if init is None else 'warm'}-{steps}-{seed}"
    if not (folder / "draft" / "config.json").is_file():
        began = time.process_time()
        given = {"max_steps": steps, "seed": seed, "init": "random" if init is None else str(init)}
        stages.train(settings(run, out / "target", given), folder, cache=out / "cache")
        report(f"{folder.name}: processor seconds", round(time.process_time() - began))
    return folder / "draft"


def measured(target: Target, draft: Path, ids: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Accepted length and its standard error, greedy and at temperature 1."""
    together, found = EvalConfig(max_new_tokens=NEW_TOKENS, batch_size=len(ids)), []
    for temperature in (0.0, 1.0):
        one = measure(target, load_draft(draft, target), ids, temperature, together)
        found += [one.accepted_length, one.standard_error]
    return tuple(found)


def settings(run: Path, target: Path, train: dict | None = None) -> RunConfig:
    return load_config(str(target), file=run / "config.yaml", train=train or {})


def over(rows: Sequence[tuple[float, ...]], at: int) -> float:
    return statistics.fmean(row[at] for row in rows)


def report(what: str, value: object) -> None:
    print(f"{what}: {json.dumps(value)}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of `nds demo`, or one that holds target/")
    parser.add_argument("--run", type=Path, help="run folder of the old draft; the demo's own when not given")
    parser.add_argument("--steps", type=int, default=700, help="N")
    parser.add_argument("--further", type=int, default=150, help="steps of the target on the other text")
    parser.add_argument("--prompts", type=int, default=900, help="of the other text, answered by the new target")
    parser.add_argument("--measured", type=int, default=48, help="held-out prompts")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[42])
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
