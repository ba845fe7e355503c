"""Jamba: every layer is Mamba-1 or attention without rope, then an MLP or experts of the same width.

Which layers attend follows from a period and an offset. transformers starts the scan of several tokens from nothing
even when its cache holds a state; here every block goes through `targets.mamba1`, which does not.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemotron_dspark.targets import mamba1
from nemotron_dspark.targets.families import hybrids
from nemotron_dspark.targets.families.decoders import as_built
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    built = as_built(config, name)
    period, offset = int(built["attn_layer_period"]), int(built["attn_layer_offset"])
    layers = range(int(require(config, "num_hidden_layers")))
    return hybrids.hybrid_spec(
        config,
        name,
        layers=[LayerKind.DECODER if layer % period == offset else LayerKind.MAMBA1 for layer in layers],
        final_norm="final_layernorm",
        intermediate_size=int(require(config, "intermediate_size")),
        num_key_value_heads=int(built["num_key_value_heads"]),
        norm_eps=float(built["rms_norm_eps"]),
        tie_word_embeddings=bool(built["tie_word_embeddings"]),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make its Mamba-1 states."""
    mixers = mixers_of(model, spec, LayerKind.MAMBA1, "mamba")
    return install_block_forward(mixers, mamba1.Mamba1States, mamba1.block_forward)


FAMILY = Family(spec, prepare, mask_beside_recurrence)
