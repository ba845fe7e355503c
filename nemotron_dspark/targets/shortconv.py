"""Short convolutions (LFM2) that can keep any prefix of a block: the whole state is the last inputs of each.

A layer gates, convolves over a few positions and gates again (Liquid AI 2025, "LFM2 technical report"):

    y_t = C_t ⊙ Σ_j w_j (B ⊙ x)_{t-j}

so after n accepted tokens the state is the last of the old inputs and of the block's first n.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nemotron_dspark.targets.recurrent import LayerStates, advance_window, convolve


@dataclasses.dataclass
class _BlockRecord:  # what one layer's block leaves behind until it is committed
    inputs: Tensor  # [B, m, H], B ⊙ x


@dataclasses.dataclass
class ConvStates(LayerStates):
    """The committed inputs of every short convolution of a target, for B rows."""

    @staticmethod
    def shapes(mixer: Any) -> tuple[tuple[int, ...], ...]:
        channels, _, kernel = mixer.conv.weight.shape
        return ((kernel - 1, channels),)

    def commit(self, kept: Sequence[int]) -> None:
        (conv,) = self.tensors()
        conv.copy_(advance_window(conv, self.take_records().inputs, kept))


def block_forward(mixer: Any, hidden: Tensor, states: ConvStates, layer: int) -> Tensor:
    """A short convolution of `transformers` on a block [B, m, H] behind the committed tokens; commits nothing."""
    (window,) = states.of(layer)
    before, after, x = mixer.in_proj(hidden).chunk(3, dim=-1)
    inputs = before * x
    states.record(layer, _BlockRecord(inputs))
    return mixer.out_proj(after * convolve(window, inputs, mixer.conv).to(hidden.dtype))
