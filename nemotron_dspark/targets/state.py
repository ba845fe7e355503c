"""The decoding state of a target for B rows of different lengths: what is committed, and the block in flight.

It is handed to the model in place of its cache. Attention layers write their keys and values behind the committed
ones, where nobody reads them until the length says so; recurrent layers record their block (see `mamba2`). Committing
moves the lengths and advances the recurrent states; anything not committed is forgotten by not being counted.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from nemotron_dspark.targets.kv import RaggedKV


class Recurrent(Protocol):
    """The committed states of all recurrent layers for B rows, and their records of the block in flight."""

    def commit(self, kept: Sequence[int]) -> None:
        """Advance every layer by the first ``kept[b]`` tokens of the block last recorded."""
        ...

    def select(self, rows: Sequence[int]) -> Self:
        """A copy of ``rows`` in that order."""
        ...

    @staticmethod
    def cat(parts: Sequence[Any]) -> Any:
        """The rows of ``parts`` one after the other."""
        ...


# ids [B, m], positions [B, m] and a cache -> final-norm hidden states [B, m, H] and taps [B, m, T·H]
Forward: TypeAlias = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


class State(Protocol):
    """Committed tokens of B rows. Made by `Target.prefill`, changed only by `Target.verify` and `Target.commit`."""

    lengths: list[int]  # committed tokens per row
    block: int | None  # length of the block that waits for a commit

    @property
    def rows(self) -> int: ...

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, m, H] and taps [B, m, T·H] of a block ``ids`` [B, m] behind each row; commits nothing."""
        ...

    def commit(self, kept: Sequence[int]) -> None:
        """Keep the first ``kept[b]`` tokens of the block last run in each row and forget the rest."""
        ...

    def select(self, rows: Sequence[int]) -> Self:
        """A state of ``rows`` in that order; a copy, so the old one stays usable."""
        ...

    @staticmethod
    def cat(states: Sequence[Any]) -> Any:
        """The rows of ``states``, all of one class, one after the other."""
        ...


class TargetState:
    """A `State` of keys and values by layer and of recurrent states; the model takes it for its cache."""

    def __init__(
        self,
        lengths: Sequence[int],
        attention: dict[int, RaggedKV],
        recurrent: Recurrent | None,
        forward: Forward,
    ):
        self.lengths = list(lengths)
        self.attention = attention  # by layer id
        self.recurrent = recurrent
        self.block: int | None = None
        self._forward = forward

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What an attention layer of `transformers` calls: keep the block's keys and values, return all of them."""
        return self.attention[layer_idx].write(keys, values, self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of the cache interface of `transformers`; positions are always passed explicitly."""
        return max(self.lengths)

    def positions(self, block: int, device: torch.device) -> Tensor:
        """Positions [B, m] of the next ``block`` tokens of each row."""
        starts = torch.tensor(self.lengths, device=device)
        return starts[:, None] + torch.arange(block, device=device)

    def mask(self, block: int, device: torch.device, window: int | None = None) -> Tensor:
        """Which stored positions each token of the next block may see: bool [B, 1, m, max(lengths) + m].

        With ``window`` a token sees itself and the ``window - 1`` positions before it.
        """
        stored = torch.arange(max(self.lengths) + block, device=device)
        positions = self.positions(block, device)[:, :, None]
        seen = stored <= positions
        if window is not None:
            seen &= stored > positions - window
        return seen[:, None]

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.block = ids.shape[1]
        return self._forward(ids, self.positions(self.block, ids.device), self)

    def commit(self, kept: Sequence[int]) -> None:
        if self.recurrent is not None:
            self.recurrent.commit(kept)
        self.lengths = [length + count for length, count in zip(self.lengths, kept, strict=True)]
        self.block = None

    def select(self, rows: Sequence[int]) -> "TargetState":
        lengths = [self.lengths[row] for row in rows]
        attention = {layer: kv.select(rows, max(lengths)) for layer, kv in self.attention.items()}
        recurrent = self.recurrent.select(rows) if self.recurrent is not None else None
        return TargetState(lengths, attention, recurrent, self._forward)

    @staticmethod
    def cat(states: Sequence["TargetState"]) -> "TargetState":
        first = states[0]
        if len(states) == 1:
            return first
        recurrent = [state.recurrent for state in states]
        return TargetState(
            [length for state in states for length in state.lengths],
            {layer: RaggedKV.cat([state.attention[layer] for state in states]) for layer in first.attention},
            first.recurrent.cat(recurrent) if first.recurrent is not None else None,
            first._forward,
        )
