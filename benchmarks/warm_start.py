"""A draft for a fine-tuned target: from the draft of the target before, or from random weights.

    python benchmarks/warm_start.py runs/warm-start [--steps 450] [--further 250] [--seeds 42,43]

The demo's hybrid is trained, and a draft for it. Then the target goes on training on other text (modules of Python's
library about networks), of which some modules are held back. On the new target's own answers to that text a fresh draft
trains for N and for N/3 steps, and one that `train.init` starts from the old draft for N/3. All are measured on prompts
of the modules held back: accepted length ± standard error over the prompts, greedy and at temperature 1. The row of 0 steps is
the old draft on the new target. What is in the folder is not made again.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nemotron_dspark import files, stages
from nemotron_dspark.config import EvalConfig, RunConfig, load_config
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.evaluation.measure import measure, prompt_ids
from nemotron_dspark.recipe import tiny
from nemotron_dspark.recipe.corpus import HELD_OUT, MODULES, passages, sources
from nemotron_dspark.recipe.demo import Budget, answer_prompts, build_demo_cache
from nemotron_dspark.recipe.demo_target import LENGTH, PEAK_LR, fit, token_stream, train_target
from nemotron_dspark.recipe.progress import Progress
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Target

OTHER = (
    "ftplib", "http/client", "http/cookies", "http/server", "imaplib", "logging/handlers", "mailbox", "smtplib", "ssl",
    "urllib/parse", "urllib/request", "email/header", "email/message",
)  # fmt: skip
OTHER_HELD_OUT = ("poplib", "http/cookiejar", "urllib/robotparser", "xmlrpc/client")


def main() -> None:
    options = arguments()
    folder, steps = options.folder, options.steps
    budget = dataclasses.replace(Budget(), target_steps=options.target, train_prompts=options.prompts)
    before, after = folder / "before", folder / "after"
    for place in (before, after):
        place.mkdir(parents=True, exist_ok=True)
    if not (before / "target" / "config.json").is_file():
        report("target", train_target(before / "target", budget.target_steps))
    data(before, MODULES, budget)
    if not (after / "target" / "config.json").is_file():
        further(before / "target", after / "target", options.further)
    target = data(after, OTHER, budget)
    held_out = prompts(after / "held_out.jsonl", OTHER_HELD_OUT, options.measured, 2)
    ids = prompt_ids(target, held_out, new_tokens=64)
    found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for seed in options.seeds:
        old = train(before, folder / f"draft-before-{seed}", steps, seed)
        for name, init, count in (
            ("the old draft", old, 0),
            ("fresh", None, steps // 3),
            ("fresh", None, steps),
            ("--from the old draft", old, steps // 3),
        ):
            out = folder / f"draft-{'fresh' if init is None else 'warm'}-{count}-{seed}"
            draft = old if not count else train(after, out, count, seed, init)
            found.setdefault((name, count), []).append(measured(target, draft, ids))
            report(f"{name}, {count} steps, seed {seed}", found[name, count][-1])
    print("| draft | steps | greedy | temperature 1 |\n|---|---|---|---|")
    for (name, count), rows in found.items():
        lengths = (f"{over(rows, at):.2f} ± {over(rows, at + 1) / len(rows) ** 0.5:.2f}" for at in (0, 2))
        print(f"| {name} | {count} | {' | '.join(lengths)} |")


def data(place: Path, modules: Sequence[str], budget: Budget) -> Target:
    """The target in ``place``, with a cache of its answers to prompts of ``modules``."""
    config = settings(place)
    target = stages.load_target(config)
    if not (place / "conversations.jsonl").is_file():
        prompts(place / "prompts.jsonl", modules, budget.train_prompts, 1)
        answer_prompts(target, place, config, budget, Progress())
    if not (place / "cache" / "manifest.json").is_file():
        build_demo_cache(target, place, config, Progress())
    return target


def further(source: Path, out: Path, steps: int) -> None:
    """Go on training the target in ``source`` on the other text, at half the rate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    streams = {
        name: token_stream(tokenizer, passages(sources(modules), 300, 3))
        for name, modules in (("old text", HELD_OUT), ("other text", OTHER_HELD_OUT))
    }
    losses = {name: [loss(model, stream)] for name, stream in streams.items()}
    stream = token_stream(tokenizer, passages(sources(OTHER), 12_000, 0))
    fit(model.train(), stream, steps, peak_lr=PEAK_LR / 2)
    for name, held in streams.items():
        losses[name].append(loss(model.eval(), held))
    report("loss before and after, of modules not seen", losses)
    tiny.save_target(out, model, tokenizer)


@torch.no_grad()
def loss(model, stream: torch.Tensor) -> float:
    pieces = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)[:64]
    return model(input_ids=pieces, labels=pieces, use_cache=False).loss.item()


def prompts(path: Path, modules: Sequence[str], count: int, seed: int) -> Path:
    rows = [{"prompt": item.question} for item in passages(sources(tuple(modules)), count, seed)]
    files.write_text(path, "".join(files.json_line(row) for row in rows))
    return path


def train(place: Path, out: Path, steps: int, seed: int, init: Path | None = None) -> Path:
    """The draft that is trained on the cache in ``place``."""
    began = time.monotonic()
    if not (out / "draft" / "config.json").is_file():
        given = {"max_steps": steps, "seed": seed, **({} if init is None else {"init": str(init)})}
        stages.train(settings(place, given), out, cache=place / "cache")
        report(f"{out.name}: seconds", time.monotonic() - began)
    return out / "draft"


def measured(target: Target, draft: Path, ids: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Accepted length and its standard error, greedy and at temperature 1."""
    together, found = EvalConfig(max_new_tokens=64, batch_size=len(ids)), []
    for temperature in (0.0, 1.0):
        one = measure(target, load_draft(draft, target), ids, temperature, together)
        found += [one.accepted_length, one.standard_error]
    return tuple(found)


def settings(place: Path, train: dict | None = None) -> RunConfig:
    demo = resource_folder("configs") / "demo.yaml"
    return load_config(str(place / "target"), file=demo, train=train or {})


def over(rows: Sequence[tuple[float, ...]], at: int) -> float:
    return statistics.fmean(row[at] for row in rows)


def report(what: str, value: object) -> None:
    print(f"{what}: {json.dumps(value, default=dataclasses.asdict)}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=450, help="N, of the old draft and the fresh one")
    parser.add_argument("--target", type=int, default=560, help="steps of the target")
    parser.add_argument("--further", type=int, default=250, help="steps of the target on the other text")
    parser.add_argument("--prompts", type=int, default=1200, help="prompts answered for each target")
    parser.add_argument("--measured", type=int, default=64, help="held-out prompts")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[42])
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
