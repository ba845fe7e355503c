"""Caches of samples that are in memory, in DeepSpec's format."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_dspark.cache.deepspec_layout import DeepSpecLayout
from nemotron_dspark.cache.layout import Sample
from nemotron_dspark.cache.writer import CacheWriter


def write_cache(
    folder: Path | str, samples: Iterable[Sample], *, shard_bytes: int = 4 * 1024**3, **settings: Any
) -> None:
    samples = list(samples)
    lengths = np.asarray([len(sample.input_ids) for sample in samples])
    layout = DeepSpecLayout.of(lengths, shard_bytes=shard_bytes, **settings)
    with CacheWriter(folder, layout) as writer:
        for number, sample in enumerate(samples):
            ids, mask = sample.input_ids.numpy().astype(np.int32), sample.loss_mask.numpy().astype(np.uint8)
            writer.commit({number: writer.files.write(number, ids, mask, sample.taps, sample.last)})
        writer.finish()
