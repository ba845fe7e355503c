"""One training step, forward and backward, here and in other projects that train DSpark drafts, on the same weights.

    python benchmarks/train_step.py [--vocab 131072] [--vocab 8192] [--threads 2] [--repetitions 9] [--json]

A tiny random Nemotron-H with a vocabulary of V gives the hidden states of one sequence. Every implementation that can
be imported is loaded with the same draft into a process of its own; the processes take their steps in turn, so that
what else the machine does falls on all alike. Peers are looked for where Python looks, in the folders of NDS_PEERS
(separated as in PATH; wheels unpacked without their dependencies will do) and, for DeepSpec, in DEEPSPEC_HOME.

- ms: median wall time of a step, after one that is not counted; cpu_ms: the same in processor time of all threads.
- step_mb: highest resident memory during the step minus the resident memory just before, weights and batch loaded and
  freed memory given back to the system; the median. 4 bytes a trainable weight of it are the gradients.
- loss: must agree with ours to 1e-5, except for speculators, which trains on another loss. nds_bf16 computes in bf16,
  is no peer and has the loss of that rounding. With --part N there is also nds_part, a draft of N of the V tokens.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VOCABULARIES = (131072, 8192)
HIDDEN, LENGTH, PROMPT, ANCHORS, TAPS = 256, 512, 64, 64, (1, 3, 5)
DRAFT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "block_size": 7,
    "mask_token_id": 31,
    "target_layer_ids": TAPS,
    "num_target_layers": 8,
    "num_anchors": ANCHORS,
    "markov_rank": 64,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, action="append", help=f"may be repeated; default {VOCABULARIES}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--part", type=int, help="also a draft that can draft so many tokens only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "CASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(*given.worker)

    from train_step_peers import ENTRIES, OTHER_LOSS

    names = given.only.split(",") if given.only else list(ENTRIES)
    names += [f"nds_part:{given.part}"] if given.part else []
    result: dict = {"threads": given.threads, "repetitions": given.repetitions, "rows": [], "absent": {}, "ratios": {}}
    disagree = []
    for vocabulary in given.vocab or VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder:
            make_case(Path(folder), vocabulary)
            rows, absent = run(names, Path(folder), given.threads, given.repetitions)
        rows = [{"name": row.pop("name"), "vocab": vocabulary} | row for row in rows]
        result["rows"] += rows
        result["absent"] |= absent
        ours = next((row for row in rows if row["name"] == "nds"), None)
        peers = [row for row in rows if not row["name"].startswith("nds")]
        if ours and peers:
            best = {key: min(row[key] for row in peers) for key in ("ms", "cpu_ms", "step_mb")}
            result["ratios"][vocabulary] = {key: round(ours[key] / value, 3) for key, value in best.items()}
            for row in rows:
                if (
                    row["name"] not in OTHER_LOSS
                    and ":" not in row["name"]
                    and abs(row["loss"] / ours["loss"] - 1) > 1e-5
                ):
                    disagree.append(f"{row['name']} at {vocabulary}: loss {row['loss']}, ours {ours['loss']}")
        if not given.json:
            show(vocabulary, rows, result["ratios"].get(vocabulary))
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        for name, reason in result["absent"].items():
            print(f"{name}: not here ({reason})")
    for line in disagree:
        print(f"The losses do not agree: {line}.", file=sys.stderr)
    return 1 if disagree else 0


def make_case(folder: Path, vocabulary: int) -> None:
    """Write the hidden states of a tiny target and a draft for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from nemotron_dspark.drafts.config import DraftConfig
    from nemotron_dspark.drafts.dspark import DSparkDraft
    from nemotron_dspark.recipe import tiny
    from nemotron_dspark.training.anchors import draw_anchors

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.nemotron_h_config("M-*-M-*-", vocabulary, HIDDEN)).eval()
    ids = torch.randint(DRAFT["mask_token_id"] + 1, vocabulary, (LENGTH,))
    with torch.no_grad():
        states = model.model(ids[None], output_hidden_states=True).hidden_states
    last = torch.nn.functional.rms_norm(states[-1][0], (HIDDEN,))
    mask = torch.ones(LENGTH, dtype=torch.bool)
    mask[:PROMPT] = False
    inside = mask.clone()
    inside[-DRAFT["block_size"] :] = False  # every slot of every block counts, and speculators draws no later ones
    batch = {
        "input_ids": ids,
        "loss_mask": mask.byte(),
        "taps": torch.cat([states[layer + 1][0] for layer in TAPS], dim=-1),
        "last": last,
        "anchors": draw_anchors(inside, ANCHORS, seed=0, epoch=0, sample_id=0),
    }
    save_file({name: value.contiguous() for name, value in batch.items()}, folder / "batch.safetensors")
    draft = DSparkDraft(DraftConfig(vocab_size=vocabulary, **DRAFT), seed=1)
    scale = 2 / model.lm_head.weight.std() / HIDDEN**0.5  # logits of deviation 2: neither flat nor certain
    draft.set_embeddings(model.get_input_embeddings().weight, model.lm_head.weight * scale)
    draft.save(folder / "draft")


def run(names: list[str], folder: Path, threads: int, repetitions: int) -> tuple[list[dict], dict[str, str]]:
    """A row for each implementation that is here, and the reason for each that is not."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    workers: dict[str, subprocess.Popen] = {}
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            command = [sys.executable, __file__, "--worker", name, str(folder)]
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            workers[name] = stack.enter_context(subprocess.Popen(command, env=environment, **pipes))
            workers[name].errors = errors
            stack.callback(workers[name].kill)
        for name in names:
            ready = _answer(workers[name])
            if "absent" in ready:
                absent[name] = ready["absent"]
                del workers[name]
        taken: dict[str, list[dict]] = {name: [] for name in workers}
        for repetition in range(repetitions + 1):
            turn = list(workers)
            for name in turn[repetition % len(turn) :] + turn[: repetition % len(turn)]:
                workers[name].stdin.write("step\n")
                workers[name].stdin.flush()
                taken[name].append(_answer(workers[name]))
    rows = [
        {"name": name}
        | {key: round(statistics.median(step[key] for step in steps[1:]), 1) for key in ("ms", "cpu_ms", "step_mb")}
        | {"loss": steps[-1]["loss"]}
        for name, steps in taken.items()
    ]
    return rows, absent


def _answer(worker: subprocess.Popen) -> dict:
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    worker.errors.seek(0)
    raise SystemExit(f"{' '.join(worker.args)} ended:\n{worker.errors.read()}")


def work(name: str, folder: str) -> int:
    """Load one implementation and take a step for every line that comes in."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for place in (*os.environ.get("NDS_PEERS", "").split(os.pathsep), os.environ.get("DEEPSPEC_HOME", "")):
        if place:
            sys.path.append(place)
    from train_step_peers import ENTRIES, Case, nds_part

    entry, _, part = name.partition(":")
    try:
        case = Case.load(Path(folder))
        module, step = nds_part(case, int(part)) if part else ENTRIES[entry](case)
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return 0
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        module.zero_grad(set_to_none=True)
        before = _start_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        loss.backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        found = {"ms": 1000 * wall, "cpu_ms": 1000 * cpu, "step_mb": _memory("VmHWM") - before, "loss": loss.item()}
        del loss
        print(json.dumps(found), flush=True)
    return 0


def _start_memory() -> float:
    """Resident memory in MB once freed memory has gone back to the system; the high-water mark starts there."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: no figures
        return float("nan")
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024


def show(vocabulary: int, rows: list[dict], ratios: dict | None) -> None:
    print(f"\nvocabulary {vocabulary:>18,}{'ms':>10}{'cpu ms':>10}{'step MB':>10}{'loss':>12}")
    for row in rows:
        print(f"{row['name']:<29}{row['ms']:>10.0f}{row['cpu_ms']:>10.0f}{row['step_mb']:>10.0f}{row['loss']:>12.6f}")
    if ratios:
        values = "".join(f"{ratios[key]:>10.2f}" for key in ("ms", "cpu_ms", "step_mb"))
        print(f"{'nds / fastest, leanest peer':<29}{values}")


if __name__ == "__main__":
    sys.exit(main())
