"""What buys accepted length: one change at a time from a recipe, trained on one cache, measured on held-out prompts.

    python benchmarks/recipe_study.py runs/demo [--steps 300] [--only "base;paper;..."] [--seeds 1,2,3] [--jobs 2]
    python benchmarks/recipe_study.py runs/demo-smollm2 --preset demo_smollm2 ...

The folder is that of `nds demo`, or holds the same: `target/`, `cache/` and `held_out.jsonl` (the hybrid's are written
anew, as many as are asked for). Every variant is trained in a process of its own and kept in the folder's `study/`; one
that is there is not trained again.

- greedy, sampled: accepted length ± standard error over the prompts or over the seeds, at temperature 0 and 1.
- cpu min: processor time of the training, all threads; on a GPU, where it says little, minutes are what to read.
"""

import argparse
import concurrent.futures
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from nemotron_dspark.config import RunConfig
    from nemotron_dspark.targets import Target


class Times(float):
    """A change that multiplies the base's value."""


# What changes, and how many times the steps of the base.
DEEPSPEC = {
    "lr": 6e-4,
    "betas": (0.9, 0.999),
    "num_anchors": 512,
    "epochs": 10,
    "max_steps": None,
}  # but its 512 samples a step, which are a third of the demo's
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "base": ({}, 1.0),
    "paper": ({"train": DEEPSPEC}, 1.0),
    "paper, rate of base": ({"train": {key: DEEPSPEC[key] for key in ("num_anchors", "epochs", "max_steps")}}, 1.0),
    "steps / 2": ({}, 0.5),
    "steps x2": ({}, 2.0),
    "steps x4": ({}, 4.0),
    "rate / 4": ({"train": {"lr": Times(0.25)}}, 1.0),
    "rate / 2": ({"train": {"lr": Times(0.5)}}, 1.0),
    "rate x2": ({"train": {"lr": Times(2.0)}}, 1.0),
    "betas 0.9, 0.999": ({"train": {"betas": (0.9, 0.999)}}, 1.0),
    "random start": ({"train": {"init": "random"}}, 1.0),
    "start from target": ({"train": {"init": "target"}}, 1.0),
    "cross-entropy": ({"train": {"ce_alpha": 1.0, "l1_alpha": 0.0, "confidence_alpha": 0.0}}, 1.0),
    "0.3 + 0.7": ({"train": {"ce_alpha": 0.3, "l1_alpha": 0.7}}, 1.0),
    "0.1 + 0.9": ({"train": {"ce_alpha": 0.1, "l1_alpha": 0.9}}, 1.0),
    "L1": ({"train": {"ce_alpha": 0.0, "l1_alpha": 1.0}}, 1.0),
    "no confidence": ({"train": {"confidence_alpha": 0.0}}, 1.0),
    "no decay": ({"train": {"loss_decay_gamma": None}}, 1.0),
    "decay 2": ({"train": {"loss_decay_gamma": 2.0}}, 1.0),
    "no warm-up": ({"train": {"warmup_ratio": 0.0}}, 1.0),
    "anchors / 4": ({"train": {"num_anchors": Times(0.25)}}, 1.0),
    "anchors / 2": ({"train": {"num_anchors": Times(0.5)}}, 1.0),
    "anchors x2": ({"train": {"num_anchors": Times(2.0)}}, 1.0),
    "batch / 2": ({"train": {"local_batch_size": Times(0.5), "global_batch_size": Times(0.5)}}, 1.0),
    "batch x2": ({"train": {"global_batch_size": Times(2.0)}}, 1.0),
    "1 layer": ({"draft": {"num_layers": 1}}, 1.0),
    "2 layers": ({"draft": {"num_layers": 2}}, 1.0),
    "3 layers": ({"draft": {"num_layers": 3}}, 1.0),
    "rank 256": ({"draft": {"markov_rank": 256}}, 1.0),
    "rank 32": ({"draft": {"markov_rank": 32}}, 1.0),
    "half the vocabulary": ({"draft": {"vocabulary": Times(0.5)}}, 1.0),
    # Of the hybrid's demo only: caches of their own, built when they are first asked for.
    "compact cache": ({"data": "compact"}, 1.0),
    "greedy answers": ({"data": "greedy"}, 1.0),
    "sampled answers": ({"data": "sampled"}, 1.0),
}


def main() -> None:
    options = arguments()
    if options.one is not None:
        print(json.dumps(train_and_measure(options, options.one, options.seeds[0])))
        return
    (options.folder / "study").mkdir(exist_ok=True)
    asked = [(name, seed) for name in options.only or VARIANTS for seed in options.seeds]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for row in pool.map(lambda each: run(options, *each), asked) if row is not None]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| variant | steps | greedy | sampled | cpu min | minutes |\n|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["variant"] for row in rows):
        same = [row for row in rows if row["variant"] == name]
        mean = {key: statistics.fmean(row[key] for row in same) for key in ("steps", "cpu_minutes", "minutes")}
        lengths = [
            f"{length:.2f} ± {error:.2f}" for length, error in (over_seeds(same, key) for key in ("greedy", "sampled"))
        ]
        times = f"{mean['cpu_minutes']:.1f} | {mean['minutes']:.1f}"
        print(f"| {name} | {mean['steps']:.0f} | {' | '.join(lengths)} | {times} |")


def file_name(variant: str) -> str:
    return variant.replace(" ", "_").replace(",", "").replace("/", "by")


def over_seeds(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean of the seeds' accepted lengths, and the standard error over prompts or over seeds, whichever is larger."""
    lengths, errors = zip(*(row[key] for row in rows), strict=True)
    among = statistics.stdev(lengths) / math.sqrt(len(lengths)) if len(lengths) > 1 else 0.0
    return statistics.fmean(lengths), max(among, statistics.fmean(errors))


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any] | None:
    """The row of one variant, from its file if it was measured before."""
    kept = options.folder / "study" / f"{file_name(name)}-{seed}-{options.steps}.json"
    if not kept.is_file():
        command = [sys.executable, __file__, str(options.folder), "--one", name, "--steps", str(options.steps)]
        command += ["--prompts", str(options.prompts), "--seeds", str(seed), "--preset", options.preset]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{name}, seed {seed}, failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return None
        kept.write_text(done.stdout.strip().splitlines()[-1])
    return json.loads(kept.read_text())


def train_and_measure(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    from nemotron_dspark import stages
    from nemotron_dspark.config import EvalConfig, load_config
    from nemotron_dspark.drafts.dspark import DSparkDraft
    from nemotron_dspark.evaluation.measure import measure, prompt_ids
    from nemotron_dspark.resources import resource_folder

    folder, (changes, factor) = options.folder, VARIANTS[name]
    preset = resource_folder("configs") / f"{options.preset}.yaml"
    base = load_config(str(folder / "target"), file=preset)
    train: dict[str, Any] = {
        "max_steps": round(options.steps * factor),
        "attention": "dense",
        "checkpoint_every": 10**6,
    }
    for key, value in changes.get("train", {}).items():
        before = getattr(base.train, key)
        train[key] = type(before)(before * value) if isinstance(value, Times) else value
    draft_changes = dict(changes.get("draft", {}))
    target = stages.load_target(base)
    if isinstance(share := draft_changes.get("vocabulary"), Times):
        draft_changes["vocabulary"] = int(share * target.spec.vocab_size)
    config = load_config(str(folder / "target"), file=preset, draft=draft_changes, train=train | {"seed": seed})
    cache = cache_of(folder, changes["data"], config, target) if "data" in changes else folder / "cache"
    run_folder = folder / "study" / f"{file_name(name)}-{seed}-{options.steps}"
    began, processor = time.monotonic(), time.process_time()
    steps = stages.train(config, run_folder, cache=cache).steps
    minutes, processor = (time.monotonic() - began) / 60, (time.process_time() - processor) / 60
    draft = DSparkDraft.load(run_folder / "draft", device=target.device, dtype=target.dtype)
    together = EvalConfig(max_new_tokens=config.eval.max_new_tokens, batch_size=32)
    ids = prompt_ids(target, held_out(options), limit=options.prompts, new_tokens=config.eval.max_new_tokens)
    row = {"variant": name, "seed": seed, "steps": steps, "cpu_minutes": processor, "minutes": minutes}
    for key, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found = measure(target, draft, ids, temperature, together)
        row[key] = (found.accepted_length, found.standard_error)
        row[f"{key}_per_position"] = found.per_position
    return row


def cache_of(folder: Path, data: str, config: "RunConfig", target: "Target") -> Path:
    """The cache of a variant: the demo's answers kept compactly, or answers at one temperature alone."""
    from nemotron_dspark import stages
    from nemotron_dspark.recipe.demo import Budget, answer_prompts, build_demo_cache
    from nemotron_dspark.recipe.progress import Progress

    own = folder / "study" / f"data-{data}"
    if (own / "cache" / "manifest.json").is_file():
        return own / "cache"
    own.mkdir(exist_ok=True)
    if data == "compact":
        compact = config.model_copy(update={"cache": config.cache.model_copy(update={"format": "compact"})})
        stages.build_cache(compact, folder / "conversations.jsonl", own / "cache", target=target)
    else:
        shutil.copy(folder / "prompts.jsonl", own)
        temperature = {data: ({"greedy": 0.0, "sampled": 1.0}[data], 1.0)}
        answer_prompts(target, own, config, Budget(), Progress(), temperature)
        build_demo_cache(target, own, config, Progress())
    return own / "cache"


def held_out(options: argparse.Namespace) -> Path:
    from nemotron_dspark.recipe.corpus import HELD_OUT, write_prompts

    if options.preset != "demo":
        return options.folder / "held_out.jsonl"
    path = options.folder / "study" / f"held_out-{options.prompts}.jsonl"
    return path if path.is_file() else write_prompts(path, HELD_OUT, options.prompts, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="demo", help="of configs/: what the variants change")
    parser.add_argument("--steps", type=int, default=300, help="of the base; a variant says how many times that")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts measured")
    parser.add_argument("--jobs", type=int, default=1, help="variants trained at once")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[42])
    parser.add_argument("--only", type=lambda text: text.split(";"), help="of, with ; between: " + "; ".join(VARIANTS))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(VARIANTS)
    if unknown:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
