"""Granite 4.0: every layer is Mamba-2 or attention, then experts and a shared MLP, or the shared MLP alone.

Rope only when ``position_embedding_type`` says so; the H models have none, the small dense ones have no Mamba-2 layer.
Four multipliers: of the embedding, the attention scores and every branch of the residual stream, which the model's own
forward applies, and ``logits_scaling``, by which the LM head's output is divided: the spec carries its inverse.
"""

from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec, listed_layers
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence, prepare_mamba2
from nemotron_dspark.targets.spec import LayerKind, TargetSpec

_KINDS = {
    "mamba": LayerKind.MAMBA2,
    "linear_attention": LayerKind.MAMBA2,
    "attention": LayerKind.DECODER,
    "full_attention": LayerKind.DECODER,
}


def spec(config: ConfigFile) -> TargetSpec:
    layers = listed_layers(config, config.require("layer_types", "layers_block_type"), _KINDS)
    experts = int(config["num_local_experts"] or 0)
    return fill_spec(
        config,
        layers=layers,
        mlp="moe" if experts else "gated",
        intermediate_size=None if experts else config.size("shared_intermediate_size"),
        rope_theta=config.rope_theta() if config["position_embedding_type"] == "rope" else None,
        logit_multiplier=1.0 / float(config["logits_scaling"] or 1.0),
    )


FAMILY = Family(spec, prepare_mamba2, mask_beside_recurrence, capture_context=mamba2.even_chunks)
