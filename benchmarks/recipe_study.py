"""What buys accepted length: one change at a time from a recipe, trained on one cache, measured on held-out prompts.

    python benchmarks/recipe_study.py runs/demo-smollm2 [--steps 1200] [--only base,...] [--seeds 42]

The folder is that of `nds demo --target smollm2`, or holds the same: `target/`, `cache/` and `held_out.jsonl`. Every
variant is trained in a process of its own and kept in the folder's `study/`; one that is there is not trained again.

- greedy, sampled: accepted length ± standard error over the prompts, at temperature 0 and 1.
- cpu min: processor time of the training, all threads; on a GPU, where it says little, minutes are what to read.
"""

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# What changes, and how many times the steps of the others: about the same time on two cores where it says so.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "base": ({}, 1.0),
    "steps x2": ({}, 2.0),
    "steps x4": ({}, 4.0),
    "lr 8e-4": ({"train": {"lr": 8e-4}}, 1.0),
    "lr 3e-3": ({"train": {"lr": 3e-3}}, 1.0),
    "no init": ({"train": {"init": "random"}}, 1.0),
    "cross-entropy": ({"train": {"ce_alpha": 1.0, "l1_alpha": 0.0}}, 1.35),
    "0.1 + 0.9": ({"train": {"ce_alpha": 0.1, "l1_alpha": 0.9}}, 1.0),
    "0.6 + 0.4": ({"train": {"ce_alpha": 0.6, "l1_alpha": 0.4}}, 1.0),
    "16 anchors": ({"train": {"num_anchors": 16}}, 1.7),
    "64 anchors": ({"train": {"num_anchors": 64}}, 0.55),
    "batch 2": ({"train": {"local_batch_size": 2, "global_batch_size": 2}}, 1.8),
    "batch 8": ({"train": {"local_batch_size": 4, "global_batch_size": 8}}, 0.5),
    "1 layer": ({"draft": {"num_layers": 1}}, 1.25),
    "3 layers": ({"draft": {"num_layers": 3}}, 0.83),
    "block 3": ({"draft": {"block_size": 3}}, 1.3),
    "rank 256": ({"draft": {"markov_rank": 256}}, 1.0),
    "no decay": ({"train": {"loss_decay_gamma": None}}, 1.0),
}


def main() -> None:
    options = arguments()
    if options.one is not None:
        print(
            json.dumps(train_and_measure(options.folder, options.one, options.steps, options.prompts, options.seeds[0]))
        )
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


def over_seeds(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean of the seeds' accepted lengths, and the standard error over prompts or over seeds, whichever is larger."""
    lengths, errors = zip(*(row[key] for row in rows), strict=True)
    among = statistics.stdev(lengths) / math.sqrt(len(lengths)) if len(lengths) > 1 else 0.0
    return statistics.fmean(lengths), max(among, statistics.fmean(errors))


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any] | None:
    """The row of one variant, from its file if it was measured before."""
    kept = options.folder / "study" / f"{name.replace(' ', '_')}-{seed}-{options.steps}.json"
    if not kept.is_file():
        command = [sys.executable, __file__, str(options.folder), "--one", name, "--steps", str(options.steps)]
        command += ["--prompts", str(options.prompts), "--seeds", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{name}, seed {seed}, failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            return None
        kept.write_text(done.stdout.strip().splitlines()[-1])
    return json.loads(kept.read_text())


def train_and_measure(folder: Path, name: str, steps: int, prompts: int, seed: int) -> dict[str, Any]:
    from nemotron_dspark import stages
    from nemotron_dspark.config import EvalConfig, load_config
    from nemotron_dspark.drafts.dspark import DSparkDraft
    from nemotron_dspark.evaluation.measure import measure, prompt_ids
    from nemotron_dspark.resources import resource_folder

    changes, factor = VARIANTS[name]
    steps = round(steps * factor)
    sections: dict[str, Any] = {"draft": {}, "train": {}}
    for section, values in changes.items():
        sections[section] = dict(values)
    sections["train"] |= {"max_steps": steps, "seed": seed, "attention": "dense", "checkpoint_every": 10**6}
    preset = resource_folder("configs") / "demo_smollm2.yaml"
    config = load_config(str(folder / "target"), file=preset, **sections)
    run_folder = folder / "study" / f"{name.replace(' ', '_')}-{seed}-{steps}"
    began, processor = time.monotonic(), time.process_time()
    stages.train(config, run_folder, cache=folder / "cache")
    minutes, processor = (time.monotonic() - began) / 60, (time.process_time() - processor) / 60
    target = stages.load_target(config)
    draft = DSparkDraft.load(run_folder / "draft", device=target.device, dtype=target.dtype)
    together = EvalConfig(max_new_tokens=128, batch_size=32)
    ids = prompt_ids(target, folder / "held_out.jsonl", limit=prompts, new_tokens=128)
    row = {"variant": name, "seed": seed, "steps": steps, "cpu_minutes": processor, "minutes": minutes}
    for key, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found = measure(target, draft, ids, temperature, together)
        row[key] = (found.accepted_length, found.standard_error)
        row[f"{key}_per_position"] = found.per_position
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200, help="of the base; a variant says how many times that")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts measured")
    parser.add_argument("--jobs", type=int, default=1, help="variants trained at once")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[42])
    parser.add_argument("--only", type=lambda text: text.split(","), help="of: " + ", ".join(VARIANTS))
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
