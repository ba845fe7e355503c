"""Attention of many blocks at once, as training needs it: each block sees the context before its anchor and itself.

Keys are [context ; all blocks]. FlexAttention skips what a block does not see and never builds the mask; where it has
no backward (anywhere but CUDA) dense masks and SDPA give the same numbers: a few blocks at a time, over the context
that they see at most and their own keys, so that little is computed to be masked.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from nemotron_dspark.errors import EnvironmentFault

KINDS = ("auto", "flex", "dense")
PIECES = 4  # each adds a gradient as large as all keys, each saves half as much as the one before


@dataclasses.dataclass(frozen=True)
class BlockAttention:
    """Attention under one mask, shared by all layers of a forward."""

    kind: str  # "flex" or "dense"
    mask: Any  # BlockMask, or a list of `DensePiece`
    context_length: int  # S

    def __call__(
        self,
        queries: Tensor,  # [B, heads, A·γ, d]
        keys: Tensor,  # [B, kv_heads, S + A·γ, d]
        values: Tensor,  # [B, kv_heads, S + A·γ, d]
    ) -> Tensor:
        """[B, heads, A·γ, d]."""
        if self.kind == "flex":
            attend = _compiled_flex() if queries.is_cuda else _flex()
            return attend(queries, keys, values, block_mask=self.mask, enable_gqa=queries.shape[1] != keys.shape[1])
        sizes = [piece.mask.shape[2] for piece in self.mask]
        context_keys, block_keys = keys.tensor_split((self.context_length,), dim=2)
        context_values, block_values = values.tensor_split((self.context_length,), dim=2)
        parts = (part.split(sizes, dim=2) for part in (queries, block_keys, block_values))
        attended = [
            torch.nn.functional.scaled_dot_product_attention(
                query,
                torch.cat((context_keys[:, :, : piece.seen], own_keys), dim=2),
                torch.cat((context_values[:, :, : piece.seen], own_values), dim=2),
                attn_mask=piece.mask,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
            for piece, query, own_keys, own_values in zip(self.mask, *parts, strict=True)
        ]
        return torch.cat(attended, dim=2)


@dataclasses.dataclass(frozen=True)
class DensePiece:
    """Some neighbouring blocks."""

    seen: int  # context positions that any of them sees
    mask: Tensor  # bool [B, 1, a·γ, seen + a·γ]


def block_attention(
    anchors: Tensor,  # [B, A] positions
    context_length: int,  # S
    block_size: int,  # γ
    kind: str = "auto",
) -> BlockAttention:
    """The attention of A blocks per row over S context positions; ``kind`` is one of `KINDS`.

    Blocks that do not count are treated like any other: they see at least themselves, so no row is empty and nothing
    becomes NaN. Their outputs are for the caller to leave out.
    """
    if kind == "auto":
        kind = "flex" if anchors.is_cuda else "dense"
    build = _flex_mask if kind == "flex" else _dense_masks
    return BlockAttention(kind, build(anchors, context_length, block_size), context_length)


def _dense_masks(anchors: Tensor, context_length: int, block_size: int) -> list[DensePiece]:
    pieces = []
    for some in anchors.chunk(PIECES, dim=1):
        limit = some.repeat_interleave(block_size, dim=1)[:, None, :, None]  # [B, 1, a·γ, 1]
        seen = min(int(some.max()), context_length)
        block = torch.arange(some.shape[1], device=anchors.device).repeat_interleave(block_size)
        context = torch.arange(seen, device=anchors.device) < limit
        own = (block[:, None] == block).expand(len(anchors), 1, -1, -1)
        pieces.append(DensePiece(seen, torch.cat((context, own), dim=-1)))
    return pieces


def _flex_mask(anchors: Tensor, context_length: int, block_size: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        context = key < torch.minimum(anchors[row, block], torch.full_like(key, context_length))
        return context | ((key >= context_length) & ((key - context_length) // block_size == block))

    slots = anchors.shape[1] * block_size
    return create_block_mask(visible, anchors.shape[0], None, slots, context_length + slots, device=anchors.device)


def _flex() -> Any:
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        raise EnvironmentFault(
            "This torch has no FlexAttention.", "Install torch 2.9 or later, or set train.attention=dense."
        ) from None
    return flex_attention


@functools.cache
def _compiled_flex() -> Any:
    # Uncompiled FlexAttention would build every score; sequence lengths change from batch to batch, hence dynamic.
    return torch.compile(_flex(), dynamic=True)
