"""What `nds plan` predicts, beside what three small real runs on this machine took.

    python benchmarks/plan.py [--recipe hybrid] [--threads 1] [--json]

Each recipe makes a random target (bf16 weights on disk, as published ones are), builds a cache, trains and leaves a
draft. Disk is the size of the files. Memory is the highest resident memory of the stage above that of the process
just before it, each stage in a process of its own, in which the same stage has run once on the smallest target: so
libraries are loaded, and what they cost is not compared. Exit code 1 when disk is off by more than 1 % or memory by
more than 10 %.
"""

import argparse
import concurrent.futures
import ctypes
import json
import multiprocessing
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemotron_dspark.cli import shell

TARGETS = {
    "hybrid": {"family": "nemotron_h", "vocab_size": 1024, "hidden_size": 128},
    "wide": {"family": "nemotron_h", "vocab_size": 32768, "hidden_size": 128},
    "decoder": {"family": "qwen3", "vocab_size": 4096, "hidden_size": 256, "num_layers": 8},
}
SETTINGS = {
    "hybrid": ["cache.batch_tokens=8192", "train.num_anchors=128", "train.local_batch_size=4"],
    "wide": ["cache.batch_tokens=8192", "train.num_anchors=64"],
    "decoder": ["cache.batch_tokens=8192", "train.num_anchors=64", "train.local_batch_size=2", "draft.num_layers=3"],
}
COMMON = ["train.global_batch_size=8", "train.max_steps=3", "draft.markov_rank=64", "train.checkpoint_every=1"]
WORDS = ("state", "block", "accepted", "recurrent", "token", "hybrid", "advance", "every")
# The C library maps every block above 32 MiB on its own and gives it back when freed; smaller ones leave holes. With
# this the small tensors of these runs are treated as the large ones of a real run are.
MMAP_THRESHOLD, TRIM_THRESHOLD, BYTES = -3, -1, 65536  # of mallopt(3)
LIBRARIES = ("torch._dynamo", "transformers.models.nemotron_h.modeling_nemotron_h", "nemotron_dspark.training.run")
LIMITS = {"disk": 0.01, "memory": 0.10}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=list(TARGETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    given = parser.parse_args()
    shell.quiet_libraries()
    rows = []
    for recipe in given.recipe or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            make(recipe, Path(folder))
            found = [row for stage in STAGES for row in _worker(stage, recipe, folder, given.threads)]
            rows += [{"recipe": recipe} | row for row in found + predict(recipe, Path(folder))]
    table = []
    for row in rows:
        if "predicted" in row:
            key = (row["recipe"], row["what"])
            measured = next(r["measured"] for r in rows if (r["recipe"], r["what"]) == key and "measured" in r)
            ratio = row["predicted"] / measured
            off = abs(ratio - 1) > LIMITS[row["what"].split()[0]]
            table.append(row | {"measured": measured, "ratio": round(ratio, 4), "off": off})
    if given.json:
        print(json.dumps({"rows": table}, indent=1))
    else:
        print(f"{'recipe':<9}{'what':<18}{'predicted MB':>13}{'measured MB':>13}{'ratio':>8}")
        for row in table:
            numbers = f"{row['predicted'] / 1e6:13.2f}{row['measured'] / 1e6:13.2f}{row['ratio']:8.3f}"
            print(f"{row['recipe']:<9}{row['what']:<18}{numbers}{'  OFF' if row['off'] else ''}")
    return int(any(row["off"] for row in table))


def _worker(stage: str, recipe: str, folder: str, threads: int) -> list[dict]:
    context = multiprocessing.get_context("forkserver")  # forks of one process that has the libraries
    context.set_forkserver_preload(list(LIBRARIES))
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(measure, stage, recipe, Path(folder), threads).result()


def measure(stage: str, recipe: str, folder: Path, threads: int) -> list[dict]:
    import torch

    libc = ctypes.CDLL(None)
    for threshold in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        if not libc.mallopt(threshold, BYTES):
            raise OSError("mallopt refuses the threshold")
    torch.set_num_threads(threads)
    shell.quiet_libraries()
    run = STAGES[stage]
    if stage == "train":
        cache_stage("small", folder)
    run("small", folder)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    run(recipe, folder)
    rows = [{"what": f"memory {stage}", "measured": _resident("VmHWM") - before}]
    if stage == "cache":
        return [*rows, {"what": "disk cache", "measured": _bytes(folder / f"{recipe}-cache")}]
    made = folder / f"{recipe}-run"
    one = sorted((made / "checkpoints").iterdir())[-1]
    return [
        *rows,
        {"what": "disk checkpoint", "measured": _bytes(one)},
        {"what": "disk draft", "measured": _bytes(made / "draft")},
    ]


def make(recipe: str, folder: Path) -> None:
    import torch

    from nemotron_dspark.recipe import tiny

    for name, words, count in (("small", 30, 8), (recipe, 180, 64)):
        family = TARGETS[recipe]["family"]
        changes = {} if name == "small" else {k: v for k, v in TARGETS[recipe].items() if k != "family"}
        made = tiny.random_target(folder / "whole", family, **changes)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
        tiny.save_target(folder / name, model, AutoTokenizer.from_pretrained(made))
        draw = random.Random(0)
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                length = int(words * (0.5 + draw.random()))
                turns = (("user", 0.4 * length), ("assistant", 0.6 * length))
                messages = [{"role": r, "content": " ".join(draw.choices(WORDS, k=int(n)))} for r, n in turns]
                file.write(json.dumps({"conversations": messages}) + "\n")


def settings(name: str, folder: Path):
    from nemotron_dspark.config import load_config

    return load_config(assignments=[*COMMON, *SETTINGS.get(name, [])], target=str(folder / name))


def cache_stage(name: str, folder: Path) -> None:
    from nemotron_dspark.cache.build import build_cache
    from nemotron_dspark.targets import Target
    from nemotron_dspark.targets.taps import chosen_taps

    run = settings(name, folder)
    target = Target.of(run.target)
    taps = chosen_taps(target.spec, run.draft)
    out = folder / f"{name}-cache"
    build_cache(target, folder / f"{name}.jsonl", out, taps=taps, data=run.data, cache=run.cache)


def train_stage(name: str, folder: Path) -> None:
    from nemotron_dspark import stages

    stages.train(settings(name, folder), folder / f"{name}-run", cache=folder / f"{name}-cache")


STAGES = {"cache": cache_stage, "train": train_stage}


def predict(recipe: str, folder: Path) -> list[dict]:
    from transformers import AutoTokenizer

    from nemotron_dspark.recipe import needs, plan
    from nemotron_dspark.recipe.describe import inspect
    from nemotron_dspark.recipe.machines import Machine
    from nemotron_dspark.recipe.workload import from_file

    run = settings(recipe, folder)
    found = inspect(run)
    shape = needs.Shape.of(found)
    tokenizer = AutoTokenizer.from_pretrained(folder / recipe)
    load = from_file(folder / f"{recipe}.jsonl", tokenizer, run.data, found.spec.max_position_embeddings)
    machine = Machine("here", "here", 0, 0, 1e12, 1e12, 1e12, 1e10)
    column = plan.estimate(shape, run, load, machine).columns[0]
    rows = [
        {"what": f"memory {stage}", "predicted": column.memory[stage].host - needs.ASSUMED.libraries}
        for stage in ("cache", "train")
    ]
    one = column.disk["checkpoints"] / (run.train.keep_checkpoints + 1)
    disk = {"cache": column.disk["cache"], "checkpoint": one, "draft": column.disk["draft"]}
    return [*rows, *({"what": f"disk {name}", "predicted": value} for name, value in disk.items())]


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
