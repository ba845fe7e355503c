"""A small cache for the tiny hybrid target, and settings that train on it in no time."""

import torch

from nemotron_dspark.cache.reader import Sample

TAPS = (1, 4)
SETTINGS = (
    "draft.num_layers=1",
    "draft.block_size=3",
    "draft.markov_rank=4",
    "train.max_steps=4",
    "train.global_batch_size=4",
    "train.log_every=2",
    "train.num_anchors=8",
    "train.device=cpu",
)


def samples(count=8, hidden=64, taps=TAPS):
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        length = 14 + index
        yield Sample(
            torch.randint(40, 300, (length,), generator=generator),
            torch.arange(length) > 4,
            torch.randn(length, len(taps) * hidden, generator=generator).bfloat16(),
            torch.randn(length, hidden, generator=generator).bfloat16(),
        )
