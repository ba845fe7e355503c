"""Minitron and Nemotron-Mini: LayerNorm with 1 + weight, an ungated relu² MLP, rope on half of each head.

The draft has none of these: it is a Qwen3 with the same sizes and rope theta.
"""

from collections.abc import Mapping
from typing import Any

from nemotron_dspark.targets.families.decoders import decoder_spec
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare
from nemotron_dspark.targets.families.decoders import one_mask as block_mask
from nemotron_dspark.targets.spec import TargetSpec

__all__ = ["block_mask", "prepare", "spec"]


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    return decoder_spec(config, name, mlp="plain")
