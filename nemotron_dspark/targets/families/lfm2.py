"""LFM2, with experts too: every layer is a short convolution or attention, then an MLP or experts; tied embeddings.

The last norm is called ``embedding_norm``. Checkpoints say which layers attend by a list of kinds or by
``full_attn_idxs``, and the MLP's width before an adjustment that the model makes.
"""

from typing import TYPE_CHECKING

from nemotron_dspark.targets import shortconv
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec, listed_layers
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, decoder_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = {"conv": LayerKind.CONV, "full_attention": LayerKind.DECODER}


def _mlp_width(config: ConfigFile) -> int:
    """The width of the MLPs that the model builds: two thirds of the stated one, rounded up, if it says so."""
    width = int(config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim"):
        return width
    width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
    multiple = int(config["block_multiple_of"])
    return -(-width // multiple) * multiple


def spec(config: ConfigFile) -> TargetSpec:
    dense = int(config.get("num_dense_layers", config["num_hidden_layers"]))
    return fill_spec(
        config,
        layers=listed_layers(config, config["layer_types"], _KINDS),
        mlp="gated" if dense else "moe",
        intermediate_size=_mlp_width(config) if dense else None,
        rope_theta=config.rope_theta(),
        names=decoder_names("embedding_norm"),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make the states of its convolutions."""
    mixers = mixers_of(model, spec, LayerKind.CONV, "conv")
    return install_block_forward(mixers, shortconv.ConvStates, shortconv.block_forward)


FAMILY = Family(spec, prepare, mask_beside_recurrence)
