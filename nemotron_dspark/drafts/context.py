"""What the draft remembers while decoding: keys and values of the verified positions, per layer and row."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_dspark.targets.kv import RaggedKV


@dataclasses.dataclass
class DraftContext:
    """Projected context of one or more rows. Belongs to the draft that made it."""

    lengths: list[int]  # verified positions per row
    layers: list[RaggedKV]
    hidden: Tensor | None = None  # [B, H] what EAGLE-3 drafts from; other kinds need nothing beside keys and values

    @staticmethod
    def cat(contexts: Sequence["DraftContext"]) -> "DraftContext":
        """The rows of ``contexts`` one after the other."""
        if len(contexts) == 1:
            return contexts[0]
        return DraftContext(
            [length for context in contexts for length in context.lengths],
            [RaggedKV.cat(parts) for parts in zip(*(context.layers for context in contexts), strict=True)],
            None if contexts[0].hidden is None else torch.cat([context.hidden for context in contexts]),
        )

    def select(self, rows: Sequence[int]) -> "DraftContext":
        """A copy with ``rows`` in that order."""
        lengths = [self.lengths[row] for row in rows]
        layers = [layer.select(rows, max(lengths)) for layer in self.layers]
        return DraftContext(lengths, layers, None if self.hidden is None else self.hidden[list(rows)])
