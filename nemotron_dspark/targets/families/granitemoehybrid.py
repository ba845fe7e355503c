"""Granite 4.0: every layer is Mamba-2 or attention, then experts and a shared MLP, or the shared MLP alone.

Rope only when ``position_embedding_type`` says so; the H models have none, the small dense ones have no Mamba-2 layer.
Four multipliers: of the embedding, the attention scores and every branch of the residual stream, which the model's own
forward applies, and ``logits_scaling``, by which the LM head's output is divided: the spec carries its inverse.
"""

from collections.abc import Mapping
from typing import Any

from nemotron_dspark.targets.families import hybrids
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.mamba2 import even_chunks
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, require

_KINDS = {
    "mamba": LayerKind.MAMBA2,
    "linear_attention": LayerKind.MAMBA2,
    "attention": LayerKind.DECODER,
    "full_attention": LayerKind.DECODER,
}


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    experts = int(config.get("num_local_experts", 8) or 0)  # transformers' default; dense ones say 0
    theta, assumed = hybrids.rope_theta(config) if config.get("position_embedding_type") == "rope" else (None, ())
    return hybrids.hybrid_spec(
        config,
        name,
        layers=hybrids.listed_layers(config, _KINDS, "layer_types", "layers_block_type"),
        final_norm="norm",
        mlp="moe" if experts else "gated",
        intermediate_size=None if experts else int(require(config, "shared_intermediate_size")),
        rope_theta=theta,
        logit_multiplier=1.0 / float(config.get("logits_scaling") or 1.0),
        assumed=assumed,
    )


FAMILY = Family(spec, hybrids.prepare_mamba2, mask_beside_recurrence, capture_context=even_chunks)
