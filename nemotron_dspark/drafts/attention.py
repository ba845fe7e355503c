"""Attention of many blocks at once, as training needs it: each block sees the context before its anchor and itself.

Keys are [context ; all blocks]. FlexAttention skips what a block does not see and never builds the mask; where it has
no backward (anywhere but CUDA) a dense mask and SDPA give the same numbers.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from nemotron_dspark.errors import EnvironmentFault

KINDS = ("auto", "flex", "dense")


@dataclasses.dataclass(frozen=True)
class BlockAttention:
    """Attention under one mask, shared by all layers of a forward."""

    kind: str  # "flex" or "dense"
    mask: Any  # BlockMask, or bool [B, 1, A·γ, S + A·γ]

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
        return torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.mask, enable_gqa=queries.shape[1] != keys.shape[1]
        )


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
    build = _flex_mask if kind == "flex" else _dense_mask
    return BlockAttention(kind, build(anchors, context_length, block_size))


def _dense_mask(anchors: Tensor, context_length: int, block_size: int) -> Tensor:
    rows, blocks = anchors.shape
    limit = anchors.repeat_interleave(block_size, dim=1)[:, None, :, None]  # [B, 1, A·γ, 1]
    block = torch.arange(blocks, device=anchors.device).repeat_interleave(block_size)
    context = torch.arange(context_length, device=anchors.device) < limit
    own = (block[:, None] == block).expand(rows, 1, -1, -1)
    return torch.cat((context, own), dim=-1)


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
