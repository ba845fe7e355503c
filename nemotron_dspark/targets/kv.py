"""Keys and values of several rows whose lengths differ.

Rows are slots of one buffer. What lies beyond a row's length is dead: forgetting tokens is moving the length back, and
the next write goes over them. Readers must mask positions at or beyond the length. A row joins behind the others; when
one leaves, the last takes its place: either copies that row alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_FEWEST_POSITIONS = 64  # that a buffer has room for


class RaggedKV:
    """One layer's keys and values; the rows' lengths are kept by the owner, once for all layers."""

    def __init__(self, rows: int = 1) -> None:
        self._rows = rows
        # Keys and values [rows or more, kv_heads, positions or more, head_dim]; none before the first write.
        self._stored: tuple[Tensor, ...] = ()

    def write(self, keys: Tensor, values: Tensor, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put ``keys``/``values`` [B, kv_heads, m, head_dim] at ``starts[b]`` of each row.

        Returns views [B, kv_heads, max(starts) + m, head_dim] of everything up to the furthest row's end.
        """
        added = keys.shape[2]
        end = max(starts) + added
        if not self._stored:
            size = (self._rows, keys.shape[1], max(_FEWEST_POSITIONS, end))
            self._stored = tuple(new.new_zeros(*size, new.shape[3]) for new in (keys, values))
        elif self._stored[0].shape[2] < end:
            self._stored = tuple(resized(tensor, 2, end) for tensor in self._stored)
        for stored, new in zip(self._stored, (keys, values), strict=True):
            if min(starts) == max(starts):
                stored[: self._rows, :, end - added : end] = new
            else:
                rows = torch.arange(len(starts), device=new.device)[:, None]  # [B, 1]
                at = torch.tensor(starts, device=new.device)[:, None] + torch.arange(added, device=new.device)  # [B, m]
                stored[rows, :, at] = new.transpose(1, 2)
        all_keys, all_values = self._stored
        return all_keys[: self._rows, :, :end], all_values[: self._rows, :, :end]

    def drop(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        """Forget the first ``counts[b]`` of each row's ``lengths[b]`` positions; the others move to the front."""
        for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for stored in self._stored if count else ():
                stored[row, :, : length - count] = stored[row, :, count:length].clone()

    def size(self, length: int) -> int:
        """Bytes of the first ``length`` positions of all rows."""
        return sum(self._rows * tensor[0, :, :length].nbytes for tensor in self._stored)

    def select(self, rows: Sequence[int], length: int) -> "RaggedKV":
        """A copy that keeps ``rows`` in that order and the first ``length`` positions."""
        picked = RaggedKV(len(rows))
        picked._stored = tuple(tensor[list(rows), :, :length] for tensor in self._stored)
        return picked

    def join(self, other: "RaggedKV", length: int) -> None:
        """Put the rows of ``other``, of which ``length`` positions count, behind these."""
        rows, joined = self._rows, self._rows + other._rows
        if not self._stored:  # nothing was written yet
            self._stored = tuple(tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in other._stored)
        self._rows = joined
        self._stored = tuple(resized(resized(tensor, 2, length), 0, joined) for tensor in self._stored)
        for stored, new in zip(self._stored, other._stored, strict=bool(other._stored)):
            stored[rows:joined, :, :length] = new[: other._rows, :, :length]

    def leave(self, row: int, length: int) -> None:
        """Take ``row`` out; the last row gets its place. Of what stays, ``length`` positions count."""
        self._rows -= 1
        for stored in self._stored:
            stored[row, :, :length] = stored[self._rows, :, :length]
        if self._stored and self._rows:
            small = max(_FEWEST_POSITIONS, length)
            self._stored = tuple(shrunk(shrunk(tensor, 2, small), 0, self._rows) for tensor in self._stored)


def take_out(rows: list, row: int) -> None:
    """Remove ``row`` of a list as `RaggedKV.leave` does: the last gets its place."""
    last = rows.pop()
    if row < len(rows):
        rows[row] = last


def resized(tensor: Tensor, dim: int, needed: int) -> Tensor:
    """``tensor``, or a copy with room for ``needed`` along ``dim``: twice what it had, so that growing is rare."""
    size = tensor.shape[dim]
    return tensor if needed <= size else _copied(tensor, dim, max(needed, 2 * size), size)


def shrunk(tensor: Tensor, dim: int, needed: int) -> Tensor:
    """``tensor``, or a copy half filled along ``dim`` where ``needed`` is less than a quarter of it."""
    return tensor if 4 * needed >= tensor.shape[dim] else _copied(tensor, dim, 2 * needed, needed)


def _copied(tensor: Tensor, dim: int, size: int, kept: int) -> Tensor:
    """The first ``kept`` along ``dim`` of ``tensor`` in a tensor of ``size``; the rest is zero, for masks."""
    copy = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    copy.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
    return copy
