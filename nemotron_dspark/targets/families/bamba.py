"""Bamba: every layer is Mamba-2 or attention, then a gated MLP. Rope turns half of each head (hard-coded upstream).

The layers with attention are listed by number (``attn_layer_indices``). Positions always come from the state: on a
cache transformers' own default ignores what is already there.
"""

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence, prepare_mamba2
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, decoder_names


def _layers(config: ConfigFile) -> tuple[LayerKind, ...]:
    count = int(config.require("num_hidden_layers"))
    attention = {int(layer) for layer in config["attn_layer_indices"] or ()}
    if attention and not 0 <= min(attention) <= max(attention) < count:
        raise InputError(
            f"attn_layer_indices in the target's config.json names a layer outside 0 to {count - 1}.",
            "Restore the file from the checkpoint's repository.",
        )
    return tuple(LayerKind.DECODER if layer in attention else LayerKind.MAMBA2 for layer in range(count))


def spec(config: ConfigFile) -> TargetSpec:
    return fill_spec(
        config,
        layers=_layers(config),
        intermediate_size=config.size("intermediate_size"),
        rope_theta=config.rope_theta(),
        names=decoder_names("final_layernorm"),
    )


FAMILY = Family(spec, prepare_mamba2, mask_beside_recurrence, capture_context=mamba2.even_chunks)
