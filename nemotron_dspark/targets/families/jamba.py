"""Jamba: every layer is Mamba-1 or attention without rope, then an MLP or experts of the same width.

Which layers attend follows from a period and an offset. transformers starts the scan of several tokens from nothing
even when its cache holds a state; here every block goes through `targets.mamba1`, which does not.
"""

from typing import TYPE_CHECKING

from nemotron_dspark.targets import mamba1
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, decoder_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def spec(config: ConfigFile) -> TargetSpec:
    period, offset = int(config["attn_layer_period"]), int(config["attn_layer_offset"])
    layers = range(int(config.require("num_hidden_layers")))
    return fill_spec(
        config,
        layers=[LayerKind.DECODER if layer % period == offset else LayerKind.MAMBA1 for layer in layers],
        intermediate_size=config.size("intermediate_size"),
        names=decoder_names("final_layernorm"),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make its Mamba-1 states."""
    mixers = mixers_of(model, spec, LayerKind.MAMBA1, "mamba")
    return install_block_forward(mixers, mamba1.Mamba1States, mamba1.block_forward)


FAMILY = Family(spec, prepare, mask_beside_recurrence)
