"""Zamba2: Mamba-2 layers, before some of which one of a few shared transformer blocks runs on input and embedding.

The shared blocks' weights repeat in turn, with small adapters per use; keys and values belong to the use, so the layer
id addresses them, not the block. Their attention is twice as wide as the model: a head has 2 · hidden / heads
channels. Rope only with ``use_mem_rope``. Embedding and LM head are one tensor unless the config says otherwise.
"""

from typing import TYPE_CHECKING

from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec, listed_layers
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, decoder_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = {
    "mamba": LayerKind.MAMBA2,
    "linear_attention": LayerKind.MAMBA2,
    "hybrid": LayerKind.PARALLEL,
}


def spec(config: ConfigFile) -> TargetSpec:
    return fill_spec(
        config,
        layers=listed_layers(config, config.require("layers_block_type", "layer_types"), _KINDS),
        head_dim=int(config["attention_head_dim"]),
        intermediate_size=int(config["intermediate_size"]),
        rope_theta=config.rope_theta() if config["use_mem_rope"] else None,
        names=decoder_names("final_layernorm"),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make its Mamba-2 states.

    The step size keeps the config's ``time_step_limit``, none where there is none. transformers clamps it at
    ``time_step_min``, a value for initialisation, in its chunked form and not in its one-token form; the kernels that
    the checkpoints were trained with never do.
    """
    hybrids = mixers_of(model, spec, LayerKind.PARALLEL, "mamba_decoder")
    mixers = mixers_of(model, spec, LayerKind.MAMBA2, "mamba") | {layer: its.mamba for layer, its in hybrids.items()}
    return mamba2.prepare(dict(sorted(mixers.items())), getattr(model.config, "time_step_limit", None))


FAMILY = Family(spec, prepare, mask_beside_recurrence, capture_context=mamba2.even_chunks)
