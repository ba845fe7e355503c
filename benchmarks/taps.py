"""Do the taps that `nds taps search` chooses train a better draft? Only the taps differ between the drafts.

    python benchmarks/taps.py --run runs/demo

takes the target, the conversations and the held-out prompts of a finished `nds demo`, trains a draft for each set of
taps and each seed with the same data, order and steps, and prints one row a set. What is finished is kept in the run's
folder and not done again.
"""

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path

import torch

from nemotron_dspark import files
from nemotron_dspark.cache.build import build_cache
from nemotron_dspark.chat.mask_token import choose_mask_token
from nemotron_dspark.cli.shell import quiet_libraries
from nemotron_dspark.config import load_config
from nemotron_dspark.decoding.pair import load_draft
from nemotron_dspark.evaluation.measure import measure, prompt_ids
from nemotron_dspark.recipe.taps import collect
from nemotron_dspark.resources import resource_folder
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.tap_search import Ridge, search
from nemotron_dspark.training.metrics import read_metrics
from nemotron_dspark.training.run import train

COLUMNS = ("tau", "greedy", "sampled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished `nds demo`")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=900, help="drawn evenly from the run's")
    parser.add_argument("--tokens", type=int, default=4000, help="positions the search looks at")
    given = parser.parse_args()
    quiet_libraries()
    config = load_config(file=resource_folder("configs") / "demo.yaml", target=str(given.run / "target"))
    target = Target.of(config.target)
    work = given.run / "taps"
    data = _subset(given.run / "conversations.jsonl", work / "conversations.jsonl", given.conversations)
    prompts = prompt_ids(target, given.run / "held_out.jsonl", new_tokens=config.eval.max_new_tokens)
    results = work / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []

    count = config.draft.num_taps
    rows, _ = collect(
        target, data, gamma=config.draft.block_size, tokens=given.tokens, width=128, seed=0, data=config.data
    )
    found = search(target.spec, rows, count)
    sets = {one.name: one.taps for one in found.sets} | {"the first": tuple(range(count))}  # and a bad one
    for seed, (name, taps) in itertools.product(range(given.seeds), sets.items()):
        case = {"taps": list(taps), "seed": seed, "steps": given.steps}
        if not any(case.items() <= row.items() for row in known):
            known.append(case | _train_and_measure(target, config, data, work, prompts, taps, seed, given.steps))
            files.write_text(results, "".join(files.json_line(row) for row in known))
            print(name, json.dumps(known[-1]), flush=True)

    print(f"\n{given.steps} steps, {given.conversations} conversations, {len(prompts)} held-out prompts\n")
    ridge = Ridge(rows)
    print("| set | taps | explained | tau at the end | accepted, greedy | accepted, temperature 1 |")
    print("|---|---|---|---|---|---|")
    for name, taps in sets.items():
        of_set = [row for row in known if row["taps"] == list(taps) and row["steps"] == given.steps]
        cells = [_cell([row[column] for row in of_set]) for column in COLUMNS]
        explained = f"{100 * ridge.score(taps).explained:.2f} %"
        print(f"| {' | '.join([name, ','.join(map(str, taps)), explained, *cells])} |")


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.2f}' for value in values)})"


def _subset(source: Path, out: Path, count: int) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    files.write_text(out, "".join(lines[at * len(lines) // count] for at in range(min(count, len(lines)))))
    return out


def _train_and_measure(target, config, data, work, prompts, taps, seed, steps) -> dict[str, float]:
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    mask = choose_mask_token(target.tokenizer, target.spec).id
    build_cache(target, data, cache, taps=taps, data=config.data, cache=config.cache, mask_token_id=mask)
    training = config.train.model_copy(update={"max_steps": steps, "seed": seed})
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    report = train(config.model_copy(update={"train": training}), run, cache=cache)
    draft = load_draft(Path(report.draft_folder), target)
    tau = statistics.mean(row["tau"] for row in read_metrics(run)[-5:])
    lengths = {
        name: measure(
            target, draft, prompts, temperature=temperature, max_new_tokens=64, batch_size=len(prompts)
        ).accepted_length
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }
    shutil.rmtree(run)
    shutil.rmtree(cache)
    return {"tau": tau, **lengths}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
