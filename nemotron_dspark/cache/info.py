"""A finished cache in numbers."""

import dataclasses
from pathlib import Path

import numpy as np

from nemotron_dspark.cache.build import REPORT
from nemotron_dspark.cache.reader import TargetCache
from nemotron_dspark.files import read_json


@dataclasses.dataclass(frozen=True)
class Bin:
    """Samples of ``first`` to ``last`` tokens."""

    first: int
    last: int
    samples: int


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    folder: Path
    target: str | None
    chat_template: str | None
    format: str  # in a few words
    taps: tuple[int, ...]
    hidden_size: int
    samples: int
    tokens: int
    loss_tokens: int | None  # None for a cache that was built elsewhere
    bytes: int
    bytes_per_token: int
    shards: int
    lengths: tuple[Bin, ...]


def length_bins(lengths: np.ndarray, count: int = 8) -> tuple[Bin, ...]:
    """At most ``count`` bins of equal width from the shortest to the longest sample."""
    if not len(lengths):
        return ()
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // count)
    counts = np.bincount((lengths - low) // width)
    return tuple(
        Bin(low + number * width, min(high, low + (number + 1) * width - 1), samples)
        for number, samples in enumerate(counts.tolist())
    )


def summarise(folder: Path | str) -> CacheInfo:
    """Numbers of the cache in ``folder``; `InputError` when it cannot be opened."""
    cache = TargetCache(folder)
    report = cache.folder / REPORT
    result = read_json(report).get("result") if report.is_file() else None
    size, tokens = sum(cache.layout.shard_sizes), int(cache.lengths.sum())
    return CacheInfo(
        folder=cache.folder,
        target=cache.target_name,
        chat_template=cache.layout.extra.get("chat_template"),
        format=cache.layout.label,
        taps=cache.taps,
        hidden_size=cache.hidden_size,
        samples=len(cache),
        tokens=tokens,
        loss_tokens=result["loss_tokens"] if result else None,
        bytes=size,
        bytes_per_token=size // tokens if tokens else 0,
        shards=len(cache.layout.shard_files),
        lengths=length_bins(cache.lengths),
    )
