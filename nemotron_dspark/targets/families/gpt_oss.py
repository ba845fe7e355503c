"""gpt-oss: every layer a mixture of experts, every other one sees a window; an attention sink per head.

SDPA has no sinks, so attention runs eagerly.
"""

from collections.abc import Mapping
from typing import Any

from nemotron_dspark.targets.families.decoders import decoder_spec
from nemotron_dspark.targets.families.decoders import mask_by_layer_type as block_mask
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare
from nemotron_dspark.targets.spec import TargetSpec

__all__ = ["ATTENTION", "block_mask", "prepare", "spec"]

ATTENTION = "eager"


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    return decoder_spec(config, name, mlp="moe")
