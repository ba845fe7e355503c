"""Qwen3-Next and the text models of Qwen3.5: gated delta nets and gated attention, each with an MLP or experts behind.

Every fourth layer attends unless the config says otherwise. The attention's query projection is twice as wide as its
heads: the other half gates the output. Rope turns a quarter of each head. The norms' weights are kept minus one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemotron_dspark.targets import delta
from nemotron_dspark.targets.families import hybrids
from nemotron_dspark.targets.families.decoders import as_built
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = {"linear_attention": LayerKind.DELTA, "full_attention": LayerKind.DECODER}


def _has_dense_layer(built: Mapping[str, Any]) -> bool:
    """True when at least one layer holds an MLP instead of experts."""
    if "mlp_only_layers" not in built:  # Qwen3.5: all layers are of one sort, and only dense ones state a width
        return "intermediate_size" in built
    step, dense = int(built["decoder_sparse_step"]), built["mlp_only_layers"] or ()
    layers = range(int(built["num_hidden_layers"]))
    return not built["num_experts"] or any(layer in dense or (layer + 1) % step for layer in layers)


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    built = as_built(config, name)
    dense = _has_dense_layer(built)
    return hybrids.hybrid_spec(
        config,
        name,
        layers=hybrids.listed_layers(built, _KINDS, "layer_types"),
        final_norm="norm",
        head_dim=int(built["head_dim"]),
        mlp="gated" if dense else "moe",
        intermediate_size=int(built["intermediate_size"]) if dense else None,
        rope_theta=float(built["rope_parameters"]["rope_theta"]),
        tie_word_embeddings=bool(built["tie_word_embeddings"]),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make the states of its delta nets."""
    mixers = mixers_of(model, spec, LayerKind.DELTA, "linear_attn")
    return install_block_forward(mixers, delta.DeltaStates, delta.block_forward)


FAMILY = Family(spec, prepare, mask_beside_recurrence)
