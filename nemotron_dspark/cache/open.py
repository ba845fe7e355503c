"""Which format a cache is in, and what the one that is asked for takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_dspark.cache import compact
from nemotron_dspark.cache.compact import CompactLayout, Count
from nemotron_dspark.cache.deepspec_layout import RECORD_SIZE, DeepSpecLayout, bytes_per_token
from nemotron_dspark.cache.layout import Layout, manifest_of
from nemotron_dspark.config.run import CacheConfig
from nemotron_dspark.files import read_json


def read_layout(folder: Path) -> Layout:
    """The layout of the cache in ``folder``; `InputError` when it is none, or its manifest or index is malformed."""
    values = read_json(manifest_of(folder))
    if isinstance(values, dict) and values.get("format") == compact.FORMAT:
        return CompactLayout.read(folder)
    return DeepSpecLayout.read(folder)


def new_layout(
    cache: CacheConfig,
    lengths: np.ndarray,  # int [samples]
    predicting: np.ndarray,  # int [samples], `predicts_loss_token` counted: last states that the compact format keeps
    *,
    taps: Sequence[int],
    hidden_size: int,
    extra: Mapping[str, Any] | None = None,
) -> Layout:
    """The layout that ``cache`` asks for."""
    if cache.format == "compact":
        return CompactLayout.of(
            lengths, predicting, taps=taps, hidden_size=hidden_size, shard_bytes=cache.shard_bytes, extra=extra
        )
    return DeepSpecLayout.of(lengths, taps=taps, hidden_size=hidden_size, shard_bytes=cache.shard_bytes, extra=extra)


def stored_bytes(
    cache: CacheConfig, tokens: Count, predicting: Count, samples: int = 1, *, num_taps: int, hidden_size: int
) -> Count:
    """Bytes that ``samples`` take in the format that ``cache`` asks for, records included and shard headers not.

    They have so many ``tokens`` together, of which so many are ``predicting``; or arrays of both, for samples each.
    """
    if cache.format == "compact":
        size = compact.stored_bytes(tokens, predicting, samples, num_taps=num_taps, hidden_size=hidden_size)
        return size + samples * compact.RECORD.itemsize
    return tokens * bytes_per_token(num_taps, hidden_size) + samples * RECORD_SIZE
