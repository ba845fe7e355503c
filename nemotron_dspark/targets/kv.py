"""Keys and values of several rows whose lengths differ.

Rows share one buffer that grows by doubling. What lies beyond a row's length is dead: forgetting tokens is moving the
length back, and the next write goes over them. Readers must mask positions at or beyond the length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class RaggedKV:
    """One layer's keys and values; the rows' lengths are kept by the owner, once for all layers."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # [B, kv_heads, capacity, head_dim]
        self.values: Tensor | None = None  # [B, kv_heads, capacity, head_dim]

    def write(self, keys: Tensor, values: Tensor, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put ``keys``/``values`` [B, kv_heads, m, head_dim] at ``starts[b]`` of each row.

        Returns views [B, kv_heads, max(starts) + m, head_dim] of everything up to the furthest row's end.
        """
        added = keys.shape[2]
        end = max(starts) + added
        self._reserve(end, keys, values)
        if min(starts) == max(starts):
            self.keys[:, :, end - added : end] = keys
            self.values[:, :, end - added : end] = values
        else:
            rows = torch.arange(len(starts), device=keys.device)[:, None]  # [B, 1]
            at = torch.tensor(starts, device=keys.device)[:, None] + torch.arange(added, device=keys.device)  # [B, m]
            self.keys[rows, :, at] = keys.transpose(1, 2)
            self.values[rows, :, at] = values.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Sequence[int], length: int) -> "RaggedKV":
        """A copy that keeps ``rows`` in that order and the first ``length`` positions."""
        picked = RaggedKV()
        if self.keys is not None:
            index = torch.tensor(rows, device=self.keys.device)
            picked.keys = self.keys[:, :, :length].index_select(0, index)
            picked.values = self.values[:, :, :length].index_select(0, index)
        return picked

    @staticmethod
    def cat(parts: Sequence["RaggedKV"]) -> "RaggedKV":
        """The rows of ``parts`` one after the other."""
        longest = max(part.keys.shape[2] for part in parts)
        joined = RaggedKV()
        joined.keys = torch.cat([_padded(part.keys, longest) for part in parts])
        joined.values = torch.cat([_padded(part.values, longest) for part in parts])
        return joined

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        if self.keys is None:
            capacity = max(64, length)
            self.keys = keys.new_zeros(*keys.shape[:2], capacity, keys.shape[3])
            self.values = values.new_zeros(*values.shape[:2], capacity, values.shape[3])
        elif self.keys.shape[2] < length:
            capacity = max(length, 2 * self.keys.shape[2])
            self.keys = _padded(self.keys, capacity)
            self.values = _padded(self.values, capacity)


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2]))
