"""Keys and values of several rows whose lengths differ.

Rows share one buffer that grows by doubling. What lies beyond a row's length is dead: forgetting tokens is moving the
length back, and the next write goes over them. Readers must mask positions at or beyond the length.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class RaggedKV:
    """One layer's keys and values; the rows' lengths are kept by the owner, once for all layers."""

    def __init__(self, stored: Iterable[Tensor] = ()) -> None:
        self._stored = tuple(stored)  # keys and values [B, kv_heads, capacity, head_dim]; none before the first write

    def write(self, keys: Tensor, values: Tensor, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put ``keys``/``values`` [B, kv_heads, m, head_dim] at ``starts[b]`` of each row.

        Returns views [B, kv_heads, max(starts) + m, head_dim] of everything up to the furthest row's end.
        """
        added = keys.shape[2]
        end = max(starts) + added
        self._reserve(end, keys, values)
        for stored, new in zip(self._stored, (keys, values), strict=True):
            if min(starts) == max(starts):
                stored[:, :, end - added : end] = new
            else:
                rows = torch.arange(len(starts), device=new.device)[:, None]  # [B, 1]
                at = torch.tensor(starts, device=new.device)[:, None] + torch.arange(added, device=new.device)  # [B, m]
                stored[rows, :, at] = new.transpose(1, 2)
        all_keys, all_values = self._stored
        return all_keys[:, :, :end], all_values[:, :, :end]

    def select(self, rows: Sequence[int], length: int) -> "RaggedKV":
        """A copy that keeps ``rows`` in that order and the first ``length`` positions."""
        return RaggedKV(tensor[list(rows), :, :length] for tensor in self._stored)

    @staticmethod
    def cat(parts: Sequence["RaggedKV"]) -> "RaggedKV":
        """The rows of ``parts`` one after the other."""
        pairs = [part._stored for part in parts if part._stored]
        longest = max((keys.shape[2] for keys, _ in pairs), default=0)
        return RaggedKV(torch.cat([_padded(tensor, longest) for tensor in same]) for same in zip(*pairs, strict=True))

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        """Make room for ``length`` positions of what ``keys`` and ``values`` are like."""
        if not self._stored:
            room = max(64, length)
            self._stored = tuple(new.new_zeros(*new.shape[:2], room, new.shape[3]) for new in (keys, values))
        elif (capacity := self._stored[0].shape[2]) < length:
            self._stored = tuple(_padded(tensor, max(length, 2 * capacity)) for tensor in self._stored)


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2]))
