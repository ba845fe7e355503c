"""Forward and backward of a training step whose samples go one by one, padded, or packed into one row.

    python benchmarks/packed.py runs/demo [--steps 9]

The folder is that of `nds demo`, or holds the same: `target/` and `cache/`; settings are those of configs/demo.yaml.
Every step is taken in all three ways, in turn, from the same samples and anchors. Useful tokens are those of samples,
without padding; seconds are of the processor, means over the steps after one that is not counted.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.config import load_config
from nemotron_dspark.drafts import kinds
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.weights import read_embedding_and_head
from nemotron_dspark.training.batches import Batch, Loader
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.source import CacheSource
from nemotron_dspark.training.trainer import objective_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--kind", choices=("dspark", "dflash", "eagle3"), default="dspark")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
    config = load_config(file=settings, target=str(asked.folder / "target"))
    cache, target = TargetCache(asked.folder / "cache"), Checkpoint.of(config.target)
    spec = target.read_spec()
    section = config.draft.model_copy(update={"kind": asked.kind, "taps": list(cache.taps)})
    shape, _ = kinds.config_for(spec, section, mask_token_id=5, num_anchors=config.train.num_anchors)
    draft = kinds.draft_class(type(shape))(shape, seed=1).train()
    matrices = read_embedding_and_head(target.folder, spec)
    draft.set_embeddings(matrices.embedding, matrices.head)
    objective = objective_for(draft, config.train)
    source, schedule = CacheSource(cache), SampleSchedule.of(config.train, len(cache))

    def load(step: int, ids, packed: bool) -> Batch:
        size = draft.config.block_size
        unrolled, anchors = objective.unrolled, objective.num_anchors
        found = Loader(source, schedule, 0, anchors, size, with_last=True, unrolled=unrolled, packed=packed)
        return found(step, ids)

    taken: dict[str, list[float]] = {}
    useful, padding, fillers = [], [], []
    for step in range(asked.steps + 1):
        (ids,) = schedule.micro_batches(step, config.train, cache.lengths)
        padded = load(step, ids, False)
        ways = {
            "one by one": [load(step, ids[at : at + 1], False) for at in range(len(ids))],
            "padded": [padded],
            "packed": [load(step, ids, True)],
        }
        for name, batches in ways.items():
            draft.zero_grad()
            began = time.process_time()
            for batch in batches:
                objective(batch).total.backward()
            taken.setdefault(name, []).append(time.process_time() - began)
        useful.append(padded.tokens)
        padding.append(1 - padded.tokens / padded.input_ids.numel())
        fillers.append(1 - float(padded.block_mask.float().mean()))
    print(f"{len(ids)} samples a step: {statistics.fmean(padding):.0%} of the padded context is padding, ", end="")
    print(f"{statistics.fmean(fillers):.0%} of the blocks are fillers")
    for name, seconds in taken.items():
        mean, error = statistics.fmean(seconds[1:]), statistics.stdev(seconds[1:]) / len(seconds[1:]) ** 0.5
        print(f"{name:<12}{mean:>8.3f} ± {error:.3f} s{statistics.fmean(useful[1:]) / mean:>10,.0f} useful tokens/s")


if __name__ == "__main__":
    main()
