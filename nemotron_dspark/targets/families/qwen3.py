"""Qwen3: queries and keys are normed; with ``use_sliding_window`` its later layers see only a window."""

from nemotron_dspark.targets.families.decoders import decoder_spec as spec
from nemotron_dspark.targets.families.decoders import mask_by_layer_type as block_mask
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare

__all__ = ["block_mask", "prepare", "spec"]
