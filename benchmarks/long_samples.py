"""What a step on a long sample takes with `train.window`, beside one on a sample as long as the window.

    python benchmarks/long_samples.py [--length 32768] [--window 4096]

Memory is the highest resident memory from the reading of the micro-batch to the end of its backward, minus that just
before, as in train_step.py; the sample itself, in bf16 as in a cache, is there before. `rest_mb` are the taps of what
the window leaves out, `over_mb` how much more than them the long sample takes.
"""

import argparse
import json
import time

import numpy as np
import torch
from activation_checkpointing import Case, random_objective
from train_step import _memory, _start_memory

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.training.batches import Loader
from nemotron_dspark.training.objective import DSparkObjective
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.source import Source


class One(Source):
    """A single sample."""

    def __init__(self, sample: Case):
        self._sample, self.lengths = sample, np.array([len(sample.input_ids)])

    def samples(self, ids, step):
        return [self._sample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 32768), ("window", 4096), ("hidden", 512), ("layers", 3), ("anchors", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--whole", action="store_true", help="also without a window")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = {length: Case(length, asked.hidden, asked.vocabulary) for length in (asked.window, asked.length)}
    for sample in samples.values():
        sample.taps, sample.last = sample.taps.bfloat16(), sample.last.bfloat16()
    rest = (asked.length - asked.window) * samples[asked.length].taps.shape[1] * 2 / 1e6
    for sliding in (None, 1024):
        for recompute in (False, True):
            objective = random_objective(asked, markov_rank=64, sliding_window=sliding, recompute=recompute)
            ways = [(asked.window, asked.window), (asked.length, asked.window)]
            ways += [(asked.length, None)] if asked.whole else []
            taken = [measured(objective, samples[length], asked.anchors, window) for length, window in ways]
            row = {"sliding_window": sliding, "activation_checkpointing": recompute}
            row |= {f"{length}, window {window}": step for (length, window), step in zip(ways, taken, strict=True)}
            over = taken[1]["mb"] - taken[0]["mb"] - rest
            print(json.dumps(row | {"rest_mb": round(rest), "over_mb": round(over)}), flush=True)


def measured(objective: DSparkObjective, sample: Case, anchors: int, window: int | None) -> dict[str, float]:
    """Processor seconds and megabytes of the second of two steps, whose stretch is the sample's last one."""
    config = TrainConfig(global_batch_size=1, local_batch_size=1)
    source, size = One(sample), objective.draft.config.block_size
    load = Loader(source, SampleSchedule.of(config, 1), 0, anchors, size, with_last=True, window=window)
    if window is not None:
        sample.loss_mask[:-window] = False
    for _ in range(2):
        objective.draft.zero_grad(set_to_none=True)
        before, started = _start_memory(), time.process_time()
        batch = load(0, np.array([0]))
        objective(batch).total.backward()
        seconds, memory = time.process_time() - started, _memory("VmHWM") - before
    sample.loss_mask[:] = True
    return {"cpu_s": round(seconds, 2), "mb": round(memory)}


if __name__ == "__main__":
    main()
