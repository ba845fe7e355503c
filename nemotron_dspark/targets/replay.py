"""Rolling back any model that `transformers` can decode with a cache: copy, restore, replay.

A block runs on a copy of each row's cache. When all of it is kept the copy becomes the cache; when part of it is
kept the copy is dropped and that part runs again. It costs a second forward and a copy per rejected block, and needs
to know nothing of the model's layers. The rollback proof tells whether the model's own cache is right.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemotron_dspark.targets.state import Forward

if TYPE_CHECKING:
    from transformers import Cache


class ReplayState:
    """A `State` of which every row has a cache of the model's own."""

    def __init__(self, lengths: Sequence[int], caches: Sequence["Cache"], forward: Forward):
        self.lengths = list(lengths)
        self.block: int | None = None
        self._caches = list(caches)
        self._forward = forward
        self._seen: list[tuple[Tensor, Cache]] = []  # per row: the block's ids [1, m], the cache that holds it

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.block = ids.shape[1]
        self._seen, results = [], []
        for row, length, cache in zip(ids.split(1), self.lengths, self._caches, strict=True):
            grown = copy.deepcopy(cache)
            results.append(self._step(row, length, grown))
            self._seen.append((row, grown))
        hidden, taps = zip(*results, strict=True)
        return torch.cat(hidden), torch.cat(taps)

    def commit(self, kept: Sequence[int]) -> None:
        for row, count in enumerate(kept):
            ids, grown = self._seen[row]
            if count == ids.shape[1]:
                self._caches[row] = grown
            elif count:
                self._step(ids[:, :count], self.lengths[row], self._caches[row])
            self.lengths[row] += count
        self._seen, self.block = [], None

    def select(self, rows: Sequence[int]) -> "ReplayState":
        caches = [copy.deepcopy(self._caches[row]) for row in rows]
        return ReplayState([self.lengths[row] for row in rows], caches, self._forward)

    @staticmethod
    def cat(states: Sequence["ReplayState"]) -> "ReplayState":
        first = states[0]
        if len(states) == 1:
            return first
        lengths = [length for state in states for length in state.lengths]
        caches = [cache for state in states for cache in state._caches]
        return ReplayState(lengths, caches, first._forward)

    def _step(self, ids: Tensor, length: int, cache: "Cache") -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)[None]
        return self._forward(ids, positions, cache)
