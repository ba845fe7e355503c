"""Gemma 2: scaled tied embedding, every other layer sees a window, soft caps on attention scores and on logits.

The embedding module scales by itself. The cap on the logits is in the spec. The cap on the scores needs eager
attention: older versions of transformers (5.15) would run SDPA as well, which leaves it out without a word.
"""

from nemotron_dspark.targets.families.decoders import decoder_spec as spec
from nemotron_dspark.targets.families.decoders import mask_by_layer_type as block_mask
from nemotron_dspark.targets.families.decoders import nothing_to_prepare as prepare

__all__ = ["ATTENTION", "block_mask", "prepare", "spec"]

ATTENTION = "eager"
