"""LFM2, with experts too: every layer is a short convolution or attention, then an MLP or experts; tied embeddings.

The last norm is called ``embedding_norm``. Checkpoints say which layers attend by a list of kinds or by
``full_attn_idxs``, and the MLP's width before an adjustment that the model makes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemotron_dspark.targets import shortconv
from nemotron_dspark.targets.families import hybrids
from nemotron_dspark.targets.families.decoders import as_built
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = {"conv": LayerKind.CONV, "full_attention": LayerKind.DECODER}


def _mlp_width(built: Mapping[str, Any]) -> int:
    """The width of the MLPs that the model builds: two thirds of the stated one, rounded up, if it says so."""
    width = int(built["intermediate_size"])
    if not built.get("block_auto_adjust_ff_dim"):
        return width
    width = int(built["block_ffn_dim_multiplier"] * int(2 * width / 3))
    multiple = int(built["block_multiple_of"])
    return -(-width // multiple) * multiple


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    built = as_built(config, name)
    dense = int(built.get("num_dense_layers", built["num_hidden_layers"]))
    return hybrids.hybrid_spec(
        config,
        name,
        layers=hybrids.listed_layers(built, _KINDS, "layer_types"),
        final_norm="embedding_norm",
        mlp="gated" if dense else "moe",
        intermediate_size=_mlp_width(built) if dense else None,
        rope_theta=float(built["rope_parameters"]["rope_theta"]),
        tie_word_embeddings=bool(built["tie_word_embeddings"]),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make the states of its convolutions."""
    mixers = mixers_of(model, spec, LayerKind.CONV, "conv")
    return install_block_forward(mixers, shortconv.ConvStates, shortconv.block_forward)


FAMILY = Family(spec, prepare, mask_beside_recurrence)
