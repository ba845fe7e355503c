"""Gemma 3 (text): scaled tied embedding; most layers see a window and have a rope of their own.

The spec's rope theta is that of the layers that see everything.
"""

from collections.abc import Mapping
from typing import Any

from nemotron_dspark.targets.families.decoders import as_built, decoder_spec
from nemotron_dspark.targets.families.decoders import mask_by_layer_type as block_mask
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare
from nemotron_dspark.targets.spec import TargetSpec

__all__ = ["block_mask", "prepare", "spec"]


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    rope = as_built(config, name)["rope_parameters"]
    wide, near = (rope[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))
    note = f"rope theta {wide:g}: of the layers that see everything; those with a window use {near:g}."
    return decoder_spec(config, name, assumed=(note,))
