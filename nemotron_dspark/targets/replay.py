"""Rolling back any model that `transformers` can decode with a cache: copy, restore, replay.

A block runs on a copy of each row's cache. When all of it is kept the copy becomes the cache; when part of it is
kept the copy is dropped and that part runs again. It costs a second forward and a copy per rejected block, and needs
to know nothing of the model's layers. The rollback proof tells whether the model's own cache is right.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]  # ids [1, m], positions [1, m], cache


class ReplayState:
    """Committed tokens of B rows, each with a cache of the model's own; the interface of `TargetState`."""

    def __init__(self, lengths: Sequence[int], taps: tuple[int, ...], caches: Sequence[Any], forward: Forward):
        self.lengths = list(lengths)
        self.taps = taps
        self.block: int | None = None
        self._caches = list(caches)
        self._forward = forward  # final-norm hidden states [1, m, H] and taps [1, m, T·H]
        self._seen: list[tuple[Tensor, Any]] = []  # per row: the block's ids [1, m], the cache that holds it

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def run(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, m, H] and taps [B, m, T·H] of a block ``ids`` [B, m] behind each row; commits nothing."""
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
        """A state of ``rows`` in that order; a copy, so the old one stays usable."""
        caches = [copy.deepcopy(self._caches[row]) for row in rows]
        return ReplayState([self.lengths[row] for row in rows], self.taps, caches, self._forward)

    @staticmethod
    def cat(states: Sequence["ReplayState"]) -> "ReplayState":
        """The rows of ``states`` one after the other."""
        first = states[0]
        if len(states) == 1:
            return first
        lengths = [length for state in states for length in state.lengths]
        caches = [cache for state in states for cache in state._caches]
        return ReplayState(lengths, first.taps, caches, first._forward)

    def _step(self, ids: Tensor, length: int, cache: Any) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)[None]
        return self._forward(ids, positions, cache)
