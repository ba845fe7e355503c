"""Qwen3 MoE: experts in every layer, or in some, the others being gated MLPs; one mask for all layers."""

from collections.abc import Mapping
from typing import Any

from nemotron_dspark.targets.families.decoders import decoder_spec
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare
from nemotron_dspark.targets.families.decoders import one_mask as block_mask
from nemotron_dspark.targets.spec import TargetSpec

__all__ = ["block_mask", "prepare", "spec"]


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    everywhere = not config.get("mlp_only_layers") and int(config.get("decoder_sparse_step", 1)) == 1
    return decoder_spec(config, name, mlp="moe" if everywhere else "gated")
