"""What `train.activation_checkpointing` saves and costs: one forward and backward of a draft with it and without.

    python benchmarks/activation_checkpointing.py

Memory is the highest resident memory during the step minus that just before, as in train_step.py. Both go through the
same gradients, and are compared.
"""

import argparse
import json
import statistics
import time

import torch
from train_step import _memory, _start_memory

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.training.anchors import draw_anchors
from nemotron_dspark.training.batches import collate
from nemotron_dspark.training.objective import DSparkObjective, LossWeights


class Case:
    """A sample of random states, all of whose tokens carry loss."""

    def __init__(self, length: int, hidden: int, vocabulary: int):
        self.input_ids = torch.randint(8, vocabulary, (length,))
        self.loss_mask = torch.ones(length, dtype=torch.bool)
        self.taps = torch.randn(length, 5 * hidden)
        self.last = torch.randn(length, hidden)


def random_objective(
    asked: argparse.Namespace, *, markov_rank: int, sliding_window: int | None = None, recompute: bool = False
) -> DSparkObjective:
    """The objective of a draft with random weights, of the shape that ``asked`` says."""
    config = DraftConfig(
        hidden_size=asked.hidden,
        intermediate_size=3 * asked.hidden,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.hidden // 64,
        num_key_value_heads=asked.hidden // 256,
        head_dim=64,
        vocab_size=asked.vocabulary,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=asked.length,
        block_size=7,
        mask_token_id=1,
        target_layer_ids=(0, 1, 2, 3, 4),
        num_target_layers=8,
        num_anchors=asked.anchors,
        markov_rank=markov_rank,
        sliding_window=sliding_window,
    )
    draft = DSparkDraft(config, recompute_layers=recompute)
    draft.set_embeddings(torch.randn(asked.vocabulary, asked.hidden), torch.randn(asked.vocabulary, asked.hidden) / 32)
    return DSparkObjective(draft.train(), LossWeights())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("layers", 4), ("length", 2048), ("anchors", 512), ("vocabulary", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    objective = random_objective(asked, markov_rank=256)
    draft = objective.draft
    sample = Case(asked.length, asked.hidden, asked.vocabulary)
    anchors = draw_anchors(sample.loss_mask, asked.anchors, seed=0, epoch=0, sample_id=0)
    batch = collate([sample], [anchors], draft.config.block_size)
    taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    norms = set()
    for _ in range(asked.repetitions + 1):
        for recompute in taken:
            draft.recompute_layers = recompute
            draft.zero_grad(set_to_none=True)
            before, started = _start_memory(), time.perf_counter()
            objective(batch)[0].backward()
            taken[recompute].append((time.perf_counter() - started, _memory("VmHWM") - before))
            norms.add(float(draft.fc.weight.grad.norm()))
    for recompute, figures in taken.items():
        seconds, megabytes = (statistics.median(column) for column in zip(*figures[1:], strict=True))
        print(json.dumps({"recompute": recompute, "ms": round(1000 * seconds), "step_mb": round(megabytes)}))
    print(json.dumps({"largest difference of gradient norms": (max(norms) - min(norms)) / max(norms)}))


if __name__ == "__main__":
    main()
