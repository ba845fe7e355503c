"""Qwen3-Next and the text models of Qwen3.5: gated delta nets and gated attention, each with an MLP or experts behind.

Every fourth layer attends unless the config says otherwise. The attention's query projection is twice as wide as its
heads: the other half gates the output. Rope turns a quarter of each head. The norms' weights are kept minus one.
"""

from typing import TYPE_CHECKING

from nemotron_dspark.targets import delta
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec, listed_layers
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = {"linear_attention": LayerKind.DELTA, "full_attention": LayerKind.DECODER}


def _has_dense_layer(config: ConfigFile) -> bool:
    """True when at least one layer holds an MLP instead of experts."""
    if "mlp_only_layers" not in config:  # Qwen3.5: all layers are of one sort, and only dense ones state a width
        return "intermediate_size" in config
    step, dense = int(config["decoder_sparse_step"]), config["mlp_only_layers"] or ()
    layers = range(int(config["num_hidden_layers"]))
    return not config["num_experts"] or any(layer in dense or (layer + 1) % step for layer in layers)


def spec(config: ConfigFile) -> TargetSpec:
    dense = _has_dense_layer(config)
    return fill_spec(
        config,
        layers=listed_layers(config, config["layer_types"], _KINDS),
        mlp="gated" if dense else "moe",
        intermediate_size=config.size("intermediate_size") if dense else None,
        rope_theta=config.rope_theta(),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make the states of its delta nets."""
    mixers = mixers_of(model, spec, LayerKind.DELTA, "linear_attn")
    return install_block_forward(mixers, delta.DeltaStates, delta.block_forward)


FAMILY = Family(spec, prepare, mask_beside_recurrence)
