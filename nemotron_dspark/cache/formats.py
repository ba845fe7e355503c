"""Which format a cache is in, and what the one that is asked for takes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_dspark.cache import compact
from nemotron_dspark.cache.compact import CompactLayout
from nemotron_dspark.cache.format import RECORD_SIZE, DeepSpecLayout, bytes_per_token
from nemotron_dspark.cache.layout import Layout, manifest_of
from nemotron_dspark.config.run import CacheConfig
from nemotron_dspark.files import read_json

Targets = Callable[[], np.ndarray]  # `compact.has_target` counted in each sample; only the compact format asks for it


def read_layout(folder: Path) -> Layout:
    """The layout of the cache in ``folder``; `InputError` when it is none, or its manifest or index is malformed."""
    values = read_json(manifest_of(folder))
    if isinstance(values, dict) and values.get("format") == compact.FORMAT:
        return CompactLayout.read(folder)
    return DeepSpecLayout.read(folder)


def new_layout(
    cache: CacheConfig,
    lengths: np.ndarray,  # int [samples]
    targets: Targets,
    *,
    taps: Sequence[int],
    hidden_size: int,
    extra: Mapping[str, Any] | None = None,
) -> Layout:
    """The layout that ``cache`` asks for."""
    settings = {"taps": taps, "hidden_size": hidden_size, "shard_bytes": cache.shard_bytes, "extra": extra}
    if cache.format == "compact":
        return CompactLayout.of(lengths, targets(), **settings)
    return DeepSpecLayout.of(lengths, **settings)


def sample_sizes(
    cache: CacheConfig, lengths: np.ndarray, targets: Targets, *, num_taps: int, hidden_size: int
) -> np.ndarray:
    """Bytes that each sample takes in the format that ``cache`` asks for, its record included, int64 [samples]."""
    if cache.format == "compact":
        sizes = compact.sample_sizes(lengths, targets(), num_taps=num_taps, hidden_size=hidden_size)
        return sizes + compact.RECORD.itemsize
    return lengths * bytes_per_token(num_taps, hidden_size) + RECORD_SIZE
