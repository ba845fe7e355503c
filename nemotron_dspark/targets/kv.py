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
        all_keys, all_values = self._reserve(end, keys, values)
        if min(starts) == max(starts):
            all_keys[:, :, end - added : end] = keys
            all_values[:, :, end - added : end] = values
        else:
            rows = torch.arange(len(starts), device=keys.device)[:, None]  # [B, 1]
            at = torch.tensor(starts, device=keys.device)[:, None] + torch.arange(added, device=keys.device)  # [B, m]
            all_keys[rows, :, at] = keys.transpose(1, 2)
            all_values[rows, :, at] = values.transpose(1, 2)
        return all_keys[:, :, :end], all_values[:, :, :end]

    def select(self, rows: Sequence[int], length: int) -> "RaggedKV":
        """A copy that keeps ``rows`` in that order and the first ``length`` positions."""
        picked = RaggedKV()
        if self.keys is not None and self.values is not None:
            index = torch.tensor(rows, device=self.keys.device)
            picked.keys = self.keys[:, :, :length].index_select(0, index)
            picked.values = self.values[:, :, :length].index_select(0, index)
        return picked

    @staticmethod
    def cat(parts: Sequence["RaggedKV"]) -> "RaggedKV":
        """The rows of ``parts`` one after the other."""
        keys = [part.keys for part in parts if part.keys is not None]
        values = [part.values for part in parts if part.values is not None]
        longest = max(tensor.shape[2] for tensor in keys)
        joined = RaggedKV()
        joined.keys = torch.cat([_padded(tensor, longest) for tensor in keys])
        joined.values = torch.cat([_padded(tensor, longest) for tensor in values])
        return joined

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, with room for ``length`` positions of what ``keys`` and ``values`` are like."""
        if self.keys is None or self.values is None:
            capacity = max(64, length)
            self.keys = keys.new_zeros(*keys.shape[:2], capacity, keys.shape[3])
            self.values = values.new_zeros(*values.shape[:2], capacity, values.shape[3])
        elif self.keys.shape[2] < length:
            capacity = max(length, 2 * self.keys.shape[2])
            self.keys = _padded(self.keys, capacity)
            self.values = _padded(self.values, capacity)
        return self.keys, self.values


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2]))
