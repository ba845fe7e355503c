"""Mamba, Falcon-Mamba and Mamba-2 alone: every layer is one mixer, without attention, MLP or a limit of length.

Falcon-Mamba norms Δ, B and C as Jamba does; Mamba takes them as they are.
"""

import functools
from typing import TYPE_CHECKING

from torch import nn

from nemotron_dspark.targets import mamba1, mamba2
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec
from nemotron_dspark.targets.families.family import Family, no_mask, prepare_mamba2
from nemotron_dspark.targets.recurrent import NewRecurrent, install_block_forward, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, WeightNames

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = WeightNames(
    layers="backbone.layers",
    final_norm="backbone.norm_f",
    embedding="backbone.embeddings",
    head="lm_head",
    embedding_tensors=("backbone.embeddings.weight",),
    head_tensors=("lm_head.weight",),
)


def spec(config: ConfigFile, kind: LayerKind = LayerKind.MAMBA1) -> TargetSpec:
    return fill_spec(
        config,
        layers=(kind,) * int(config.require("num_hidden_layers")),
        head_dim=0,  # Mamba-2's head_dim is that of its states
        mlp="none",
        names=NAMES,
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make its Mamba-1 states."""
    mixers = mixers_of(model, spec, LayerKind.MAMBA1, "mixer")
    for mixer in mixers.values():
        for norm in ("dt_layernorm", "b_layernorm", "c_layernorm"):
            if not hasattr(mixer, norm):
                setattr(mixer, norm, nn.Identity())
    return install_block_forward(mixers, mamba1.Mamba1States, mamba1.block_forward)


MAMBA = Family(spec, prepare, no_mask, cache_argument="cache_params")
MAMBA2 = Family(
    functools.partial(spec, kind=LayerKind.MAMBA2),
    functools.partial(prepare_mamba2, name="mixer"),
    no_mask,
    capture_context=mamba2.even_chunks,
    cache_argument="cache_params",
)
