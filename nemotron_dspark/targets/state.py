"""The decoding state of a target for B rows of different lengths: what is committed, and the block in flight.

It is handed to the model in place of its cache. Attention layers write their keys and values behind the committed
ones, where nobody reads them until the length says so; recurrent layers record their block (see `mamba2`). Committing
moves the lengths and advances the recurrent states; anything not committed is forgotten by not being counted.
"""

import abc
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import Tensor

from nemotron_dspark.targets.kv import RaggedKV, take_out
from nemotron_dspark.targets.recurrent import RecurrentStates

if TYPE_CHECKING:
    from transformers import Cache

# ids [B, m], positions [B, m] and a cache -> final-norm hidden states [B, m, H] and taps [B, m, T·H]
Forward: TypeAlias = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


@dataclasses.dataclass(eq=False)
class State(abc.ABC):
    """Committed tokens of B rows. Made by `Target.prefill`, changed only by `Target.verify` and `Target.commit`."""

    lengths: list[int]  # committed tokens per row
    forward: Forward
    block: int | None = dataclasses.field(default=None, init=False)  # length of the block that waits for a commit

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    @abc.abstractmethod
    def shortens(self) -> bool:
        """Whether a row can be taken back by shortening its length."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Bytes of what is committed."""

    @abc.abstractmethod
    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, m, H] and taps [B, m, T·H] of a block ``ids`` [B, m] behind each row; commits nothing."""

    @abc.abstractmethod
    def commit(self, kept: Sequence[int]) -> None:
        """Keep the first ``kept[b]`` tokens of the block last run in each row and forget the rest."""

    @abc.abstractmethod
    def select(self, rows: Sequence[int]) -> Self:
        """A state of ``rows`` in that order; a copy, so the old one stays usable."""

    @abc.abstractmethod
    def join(self, other: Any) -> None:
        """Put the rows of ``other``, of the same target, behind these."""

    @abc.abstractmethod
    def leave(self, row: int) -> None:
        """Take ``row`` out; the last row gets its place."""


@dataclasses.dataclass(eq=False)
class TargetState(State):
    """A `State` of keys and values by layer and of recurrent states; the model takes it for its cache."""

    attention: dict[int, RaggedKV]  # by layer id
    recurrent: RecurrentStates | None

    @property
    def shortens(self) -> bool:
        return self.recurrent is None

    @property
    def size(self) -> int:
        held = sum(kv.size(max(self.lengths)) for kv in self.attention.values())
        return held + sum(tensor.nbytes for tensor in self.recurrent.tensors()) if self.recurrent is not None else held

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
        return self.forward(ids, self.positions(self.block, ids.device), self)

    def commit(self, kept: Sequence[int]) -> None:
        if self.recurrent is not None:
            self.recurrent.commit(kept)
        self.lengths = [length + count for length, count in zip(self.lengths, kept, strict=True)]
        self.block = None

    def select(self, rows: Sequence[int]) -> "TargetState":
        lengths = [self.lengths[row] for row in rows]
        attention = {layer: kv.select(rows, max(lengths)) for layer, kv in self.attention.items()}
        recurrent = self.recurrent.select(rows) if self.recurrent is not None else None
        return TargetState(lengths, self.forward, attention, recurrent)

    def join(self, other: "TargetState") -> None:
        for layer, kv in self.attention.items():
            kv.join(other.attention[layer], max(other.lengths))
        if self.recurrent is not None and other.recurrent is not None:
            self.recurrent.join(other.recurrent)
        self.lengths += other.lengths

    def leave(self, row: int) -> None:
        take_out(self.lengths, row)
        for kv in self.attention.values():
            kv.leave(row, max(self.lengths, default=0))
        if self.recurrent is not None:
            self.recurrent.leave(row)


@dataclasses.dataclass(eq=False)
class ReplayState(State):
    """A `State` of any model that `transformers` can decode with a cache: copy, restore, replay.

    A block runs on a copy of each row's cache. When all of it is kept the copy becomes the cache; when part of it is
    kept the copy is dropped and that part runs again. It costs a second forward and a copy per rejected block, and
    needs to know nothing of the model's layers. The rollback proof tells whether the model's own cache is right.
    """

    caches: list["Cache"]

    def __post_init__(self) -> None:
        self._seen: list[tuple[Tensor, Cache]] = []  # per row: the block's ids [1, m], the cache that holds it

    @property
    def shortens(self) -> bool:
        return False

    @property
    def size(self) -> int:
        layers = (layer for cache in self.caches for layer in getattr(cache, "layers", ()))
        return sum(each.nbytes for layer in layers for each in vars(layer).values() if isinstance(each, Tensor))

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.block = ids.shape[1]
        self._seen, results = [], []
        for row, length, cache in zip(ids.split(1), self.lengths, self.caches, strict=True):
            grown = copy.deepcopy(cache)
            results.append(self._step(row, length, grown))
            self._seen.append((row, grown))
        hidden, taps = zip(*results, strict=True)
        return torch.cat(hidden), torch.cat(taps)

    def commit(self, kept: Sequence[int]) -> None:
        for row, count in enumerate(kept):
            ids, grown = self._seen[row]
            if count == ids.shape[1]:
                self.caches[row] = grown
            elif count:
                self._step(ids[:, :count], self.lengths[row], self.caches[row])
            self.lengths[row] += count
        self._seen, self.block = [], None

    def select(self, rows: Sequence[int]) -> "ReplayState":
        caches = [copy.deepcopy(self.caches[row]) for row in rows]
        return ReplayState([self.lengths[row] for row in rows], self.forward, caches)

    def join(self, other: "ReplayState") -> None:
        self.lengths += other.lengths
        self.caches += other.caches

    def leave(self, row: int) -> None:
        take_out(self.lengths, row)
        take_out(self.caches, row)

    def _step(self, ids: Tensor, length: int, cache: "Cache") -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)[None]
        return self.forward(ids, positions, cache)
