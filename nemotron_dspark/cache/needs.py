"""What a build needs: disk, and memory at its highest point.

The memory is compared with real builds on a CPU by `benchmarks/plan.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nemotron_dspark.cache import compact
from nemotron_dspark.cache.batches import batches
from nemotron_dspark.cache.compact import Count
from nemotron_dspark.cache.deepspec_layout import RECORD, bytes_per_token
from nemotron_dspark.config.run import CacheConfig
from nemotron_dspark.targets.mamba2 import even_chunk
from nemotron_dspark.targets.spec import LayerKind, TargetSpec


def stored_bytes(
    cache: CacheConfig, tokens: Count, predicting: Count, samples: int = 1, *, num_taps: int, hidden_size: int
) -> Count:
    """Bytes that ``samples`` take in the format that ``cache`` asks for, records included and shard headers not.

    They have so many ``tokens`` together, of which so many are ``predicting``; or arrays of both, for samples each.
    """
    if cache.format == "compact":
        size = compact.stored_bytes(tokens, predicting, samples, num_taps=num_taps, hidden_size=hidden_size)
        return size + samples * compact.RECORD.itemsize
    return tokens * bytes_per_token(num_taps, hidden_size) + samples * RECORD.itemsize


def largest_batch(lengths: np.ndarray, batch_tokens: int) -> tuple[int, int]:
    """Padded tokens of the largest forward of a build, and of the one before it, which is written meanwhile."""
    sizes = [len(batch) * int(lengths[batch].max()) for batch in batches(lengths, batch_tokens)]
    largest = int(np.argmax(sizes))
    return sizes[largest], sizes[largest - 1] if largest else 0


def capture_bytes(
    spec: TargetSpec,
    config: Mapping[str, Any],  # the target's config.json: sizes of its mixers
    num_taps: int,
    batch_tokens: float,
    length: int,
    weight_bytes: int,
) -> float:
    """Activations of one forward of the target over ``batch_tokens`` padded tokens in rows of ``length``.

    The largest of two moments: inside the most demanding kind of layer, with the residual stream, its norm and the
    taps so far; or at the end, where the taps are put side by side (in the target's type) and rounded to bf16.
    """
    hidden = spec.hidden_size
    ends = weight_bytes * hidden * (2 * num_taps + 2) + 2 * hidden * (num_taps + 1)
    most = max((_layer_bytes(spec, config, kind, length, weight_bytes) for kind in set(spec.layers)), default=0.0)
    return batch_tokens * max(ends, most + weight_bytes * hidden * (num_taps + 2))


def config_size(config: Mapping[str, Any], default: int, *keys: str) -> int:
    """The first of ``keys`` that ``config``, or the language model's in one of several modalities, has a number for."""
    parts = (config, config.get("text_config") or {})
    return int(next((part[key] for key in keys for part in parts if part.get(key)), default))


def _layer_bytes(spec: TargetSpec, config: Mapping[str, Any], kind: LayerKind, length: int, b: int) -> float:
    """Bytes a token of the activations inside one layer of ``kind``, through plain torch operations.

    CUDA kernels for Mamba need less than Mamba-2 takes here. Kinds without a count of their own take Mamba-2's or the
    MLP's.
    """
    attention = b * (4 * spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
    mlp = b * (4 if spec.mlp == "gated" else 3) * (spec.intermediate_size or 0)
    if kind is LayerKind.ATTENTION:
        return attention
    if kind is LayerKind.MLP:
        return mlp
    if kind in (LayerKind.DECODER, LayerKind.MOE):
        used = config_size(config, 1, "num_experts_per_tok")
        expert = config_size(config, 0, "moe_intermediate_size")
        experts = b * used * (2 * spec.hidden_size + 3 * expert) if expert else 0
        return max(experts, mlp, attention if kind is LayerKind.DECODER else 0) + b * spec.hidden_size
    mamba = _mamba_bytes(spec, config, length, b)
    return max(mamba, attention) + b * spec.hidden_size if kind is LayerKind.PARALLEL else mamba


def _mamba_bytes(spec: TargetSpec, config: Mapping[str, Any], length: int, b: int) -> float:
    """Mamba-2's chunked scan: in fp32 per token seven vectors of its width, B and C for every head, and three scores
    for every head and position of a chunk, which `targets.mamba2.even_chunks` makes of equal size. The projection and
    the convolution before it are in the weights' type.
    """
    heads = config_size(config, spec.num_attention_heads, "mamba_num_heads", "mamba_n_heads", "linear_num_value_heads")
    head = config_size(config, spec.head_dim, "mamba_head_dim", "mamba_d_head", "linear_value_head_dim")
    state = config_size(config, 64, "ssm_state_size", "mamba_d_state", "linear_key_head_dim")
    groups = config_size(config, 1, "n_groups", "mamba_n_groups")
    chunk = even_chunk(config_size(config, 64, "chunk_size", "mamba_chunk_size"), length)
    inner = heads * head
    padded = math.ceil(length / chunk) * chunk / length
    scan = 7 * inner + 3 * heads * state + 3 * heads * chunk + inner * state / chunk
    return 4 * padded * scan + b * (3 * inner + 4 * groups * state + heads)
