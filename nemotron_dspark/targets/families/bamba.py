"""Bamba: every layer is Mamba-2 or attention, then a gated MLP. Rope turns half of each head (hard-coded upstream).

The layers with attention are listed by number (``attn_layer_indices``). Positions always come from the state: on a
cache transformers' own default ignores what is already there.
"""

from collections.abc import Mapping
from typing import Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.families import hybrids
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.mamba2 import even_chunks
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, require


def _layers(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    count = int(require(config, "num_hidden_layers"))
    attention = {int(layer) for layer in config.get("attn_layer_indices") or ()}
    if attention and not 0 <= min(attention) <= max(attention) < count:
        raise InputError(
            f"attn_layer_indices in the target's config.json names a layer outside 0 to {count - 1}.",
            "Restore the file from the checkpoint's repository.",
        )
    return tuple(LayerKind.DECODER if layer in attention else LayerKind.MAMBA2 for layer in range(count))


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    theta, assumed = hybrids.rope_theta(config)
    return hybrids.hybrid_spec(
        config,
        name,
        layers=_layers(config),
        final_norm="final_layernorm",
        intermediate_size=int(require(config, "intermediate_size")),
        rope_theta=theta,
        assumed=assumed,
    )


FAMILY = Family(spec, hybrids.prepare_mamba2, mask_beside_recurrence, capture_context=even_chunks)
