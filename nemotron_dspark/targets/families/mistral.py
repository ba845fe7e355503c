"""Mistral: a Llama in which, where the config gives a window, every layer sees only that far."""

from nemotron_dspark.targets.families.decoders import decoder_spec as spec
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare
from nemotron_dspark.targets.families.decoders import one_mask as block_mask

__all__ = ["block_mask", "prepare", "spec"]
