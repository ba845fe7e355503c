"""The parts of a draft's forward: decoder layers as Qwen3's, whose keys and values also come from the target's context.

- Two ways through the same weights: `Layer.forward` for many blocks with known context (training), `Layer.decode` for
  one block per row over stored keys and values.
- Parameters may be of another type than what is computed: every module casts its own to its input's type where it uses
  them. So fp32 parameters train in bf16 arithmetic, their gradients add up in fp32, and no copy of them is kept.
- Which keys a slot sees is said once, by `Sight`: the context before the anchor, or a window of it, and its own block,
  or what of it lies before the slot. Both ways ask it.
- In training keys are [context ; all blocks]. FlexAttention skips what a block does not see and never builds the mask.
  Where it has no backward (anywhere but CUDA) dense masks and SDPA give the same numbers: a few blocks at a time, over
  the context that they see at most and their own keys, so that little is computed to be masked.
- In decoding `DraftContext` holds what is remembered of the verified positions: with a window, only its last ones.
- A head may have a sink: a logit that takes part in its softmax and brings no value, so that it need not attend at all.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from nemotron_dspark.config.run import AttentionKind
from nemotron_dspark.drafts.config import DraftConfig, Eagle3Config
from nemotron_dspark.targets.kv import RaggedKV, take_out

PACKED_BLOCKS = 32  # of a sample's in a chunk where several samples lie in a row: fewer would be more calls
MASK_CHUNKS = 4  # each adds a gradient as large as all keys, each saves half as much as the one before

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, [..., positions, d]
FarPiece = tuple[Tensor, Rotation]  # projected taps [1, n, H] of some far positions, and [1, 1, n, d]
# From queries [B, heads, A·γ, d], keys and values [B, kv_heads, S + A·γ, d] and sinks [heads] to [B, heads, A·γ, d].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Linear(nn.Linear):
    """A linear map in its input's type, whatever type its parameters have."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, *self.cast_parameters(input.dtype))

    def cast_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in ``dtype``: themselves where it is theirs."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class RMSNorm(nn.Module):
    """RMS normalisation in its input's type, whatever type its weight has."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Rotary:
    """Rotary embedding from tables that grow by doubling; angles are fp32 whatever the weights are."""

    def __init__(self, head_dim: int, theta: float):
        self._head_dim = head_dim
        self._theta = theta
        self._tables: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """Cosines and signed sines [at least length, d] for positions from 0."""
        found = self._tables.get((device, dtype))
        if found is None or found[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            half = torch.arange(0, self._head_dim, 2, dtype=torch.float64, device="cpu") / self._head_dim
            # As Qwen3 computes them: inverse frequencies and angles in fp32.
            frequencies = (1.0 / self._theta**half).float()
            angles = torch.arange(size, dtype=torch.float32)[:, None] * frequencies
            sines = angles.sin()
            cosines = torch.cat((angles.cos(), angles.cos()), dim=-1)
            found = (cosines.to(device, dtype), torch.cat((-sines, sines), dim=-1).to(device, dtype))
            self._tables[(device, dtype)] = found
        return found


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """``x`` [..., d] turned by its positions; the halves' swap carries its sign in the sine table."""
    cosines, sines = rotation
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, dims=-1), sines)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys; ``source_size`` is the width of what it projects."""

    attention_sink_bias: nn.Parameter | None  # [heads]

    def __init__(self, config: DraftConfig | Eagle3Config, source_size: int, *, sinks: bool = False):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(source_size, query_size, bias=False)
        self.k_proj = Linear(source_size, kv_size, bias=False)
        self.v_proj = Linear(source_size, kv_size, bias=False)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.attention_sink_bias = nn.Parameter(torch.zeros(self.heads)) if sinks else None

    def queries(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """[B, n, H] to [B, heads, n, d]."""
        split = self.q_proj(hidden).unflatten(-1, (self.heads, self.head_dim))
        return rotate(self.q_norm(split).transpose(1, 2), rotation)

    def forward(
        self,
        hidden: Tensor,  # [B, A·γ, H] normed block states
        context: Tensor,  # [B, S, H] projected taps
        block_rotation: Rotation,  # [B, 1, A·γ, d]
        all_rotation: Rotation,  # [B, 1, S + A·γ, d]
        attend: Attend,
        far: Sequence[FarPiece] = (),  # what lies before the context and trains nothing
    ) -> Tensor:
        """[B, A·γ, heads·d], before the output projection."""
        # One matrix product per projection; context and blocks pass through the same weights.
        keys, values = self._keys_values(torch.cat((context, hidden), dim=1), all_rotation)
        if far:
            with torch.no_grad():
                before = [self._keys_values(*piece) for piece in far]
            keys = torch.cat((*(each for each, _ in before), keys), dim=2)
            values = torch.cat((*(each for _, each in before), values), dim=2)
        attended = attend(self.queries(hidden, block_rotation), keys, values, self.attention_sink_bias)
        return attended.transpose(1, 2).flatten(2)

    def _keys_values(self, source: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[B, n, source size] to two [B, kv_heads, n, d]."""
        keys = self.k_proj(source).unflatten(-1, (self.kv_heads, self.head_dim))
        keys = rotate(self.k_norm(keys).transpose(1, 2), rotation)
        return keys, self.v_proj(source).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DraftConfig | Eagle3Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


class _GatedSiLU(torch.autograd.Function):
    """Compute silu(gate) ⊙ up; the backward computes silu(gate) again.

    Autograd would keep it: a third of what the widest activations take.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # [..., SwiGLU size] each
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (gate, up) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


class Layer(nn.Module):
    """A decoder layer of the DSpark draft."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.hidden_size, sinks=config.attention_sinks)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,  # [B, A·γ, H]
        context: Tensor,  # [B, S, H]
        block_rotation: Rotation,
        all_rotation: Rotation,
        attend: Attend,
        far: Sequence[FarPiece] = (),
    ) -> Tensor:
        """[B, A·γ, H]; arguments as for `Attention`."""
        attended = self.self_attn(self.input_layernorm(hidden), context, block_rotation, all_rotation, attend, far)
        return self._finish(hidden, attended)

    def decode(
        self,
        hidden: Tensor,  # [B, γ, H]
        rotation: Rotation,  # [B or 1, 1, γ, d] at the block's positions
        key_value_weight: Tensor,  # [2·kv_heads·d, H], k_proj over v_proj
        stored: RaggedKV,
        starts: Sequence[int],  # stored positions per row
        mask: Tensor | None,  # bool [B, 1, γ or 1, max(starts) + γ]; None: everything is seen
    ) -> Tensor:
        """[B, γ, H]. The block's own keys lie behind the stored ones and are overwritten by what comes next."""
        attention = self.self_attn
        rows, slots, _ = hidden.shape
        normed = self.input_layernorm(hidden)
        projected = functional.linear(normed, key_value_weight).view(rows, slots, 2, attention.kv_heads, -1)
        keys = rotate(attention.k_norm(projected[:, :, 0]).transpose(1, 2), rotation)
        keys, values = stored.write(keys, projected[:, :, 1].transpose(1, 2), starts)
        # The query heads of one key head fold into one longer query.
        group = attention.heads // attention.kv_heads
        queries = attention.queries(normed, rotation).reshape(rows, attention.kv_heads, -1, attention.head_dim)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, group, 1)
        sinks = attention.attention_sink_bias
        if sinks is not None:
            sinks = sinks.view(attention.kv_heads, group).repeat_interleave(slots, dim=1)
        attended = attend_with_sinks(queries, keys, values, mask, sinks)
        attended = attended.reshape(rows, attention.heads, slots, -1).transpose(1, 2).flatten(2)
        return self._finish(hidden, attended)

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


# --- which keys a slot sees ---


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys the slots of a block see. Places count from the block's anchor: those of the context are below 0."""

    window: int | None = None  # keys fewer than this before the slot; None: all
    causal: bool = False  # no keys behind the slot

    @staticmethod
    def of(config: DraftConfig) -> "Sight":
        return Sight(config.sliding_window, config.causal_block)

    @property
    def whole(self) -> bool:
        """Whether every slot sees everything: the context and its block."""
        return self.window is None and not self.causal

    @property
    def reach(self) -> int | None:
        """Positions before its anchor that a block sees at most; None: all."""
        return None if self.window is None else self.window - 1

    def sees(self, slot: Tensor, place: Tensor) -> Tensor:
        """Whether each slot sees the key at each place of the context and its own block (they broadcast), bool."""
        seen = torch.ones_like(place, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (place > slot - self.window)
        if self.causal:
            seen = seen & (place <= slot)
        return seen


def attend_with_sinks(
    queries: Tensor,  # [B, heads, n, d]
    keys: Tensor,  # [B, kv_heads, K, d]
    values: Tensor,  # [B, kv_heads, K, d]
    mask: Tensor | None,  # bool, broadcasts to [B, heads, n, K]
    sinks: Tensor | None,  # [heads], or [heads, n] where they differ by query; None: there are none
) -> Tensor:
    """Attention [B, heads, n, d] with one key more per head, which has ``sinks`` as its score and no value.

    One component more of queries and keys gives it this score, so it needs no kernel of its own.
    """
    if sinks is None:
        grouped = queries.shape[1] != keys.shape[1]
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
    head_dim = queries.shape[-1]
    scores = sinks.to(queries.dtype).view(1, len(sinks), -1, 1).expand(*queries.shape[:-1], 1)
    sink = functional.pad(keys.new_full((*keys.shape[:2], 1, 1), head_dim**0.5), (head_dim, 0))
    attended = functional.scaled_dot_product_attention(
        torch.cat((queries, scores), dim=-1),
        torch.cat((functional.pad(keys, (0, 1)), sink), dim=2),
        functional.pad(values, (0, 1, 0, 1)),
        attn_mask=None if mask is None else functional.pad(mask, (0, 1), value=True),
        enable_gqa=queries.shape[1] != keys.shape[1],
        scale=head_dim**-0.5,
    )
    return attended[..., :head_dim]


def block_attention(
    anchors: Tensor,  # [B, A] positions
    context_length: int,  # S
    block_size: int,  # γ
    kind: AttentionKind = "auto",
    sight: Sight = Sight(),
    positions: Tensor | None = None,  # [B, S] of each token in its own sample; None: a row is one sample
    lean: bool = False,
) -> Attend:
    """The attention of A blocks per row over S context positions and the blocks themselves, for all layers.

    With ``positions`` a row holds several samples, one behind the other, and a block sees its own alone. Dense
    attention that is ``lean`` keeps no masks and no copies of keys for the backward, which makes them again.

    Fillers are treated like any other block: they see at least themselves, so no row is empty and nothing becomes NaN.
    Their outputs are for the caller to leave out.
    """
    if kind == "auto":
        kind = "flex" if anchors.is_cuda else "dense"
    if kind == "flex":
        starts = None if positions is None else anchors - positions.gather(1, anchors)
        return functools.partial(_flex_attention, _flex_mask(anchors, context_length, block_size, sight, starts))
    if positions is not None:
        return _packed_attention(anchors, positions, block_size, sight, lean)
    chunks = _chunks(anchors, context_length, block_size, sight, lean)
    return functools.partial(_dense_attention, chunks, context_length)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring blocks."""

    slots: int  # a·γ
    seen: slice  # context positions that any of them sees
    mask: Callable[[], Tensor]  # gives bool [B, 1, a·γ, seen + a·γ]
    lean: bool  # make the mask and what is attended to again in the backward

    def attend(
        self,
        queries: Tensor,  # [B, heads, a·γ, d]
        context_keys: Tensor,  # [B, kv_heads, S, d]
        context_values: Tensor,
        own_keys: Tensor,  # [B, kv_heads, a·γ, d]
        own_values: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """[B, heads, a·γ, d]."""
        keys = torch.cat((context_keys[:, :, self.seen], own_keys), dim=2)
        values = torch.cat((context_values[:, :, self.seen], own_values), dim=2)
        return attend_with_sinks(queries, keys, values, self.mask(), sinks)


def _dense_attention(
    chunks: Sequence[Chunk],
    context_length: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    sizes = [chunk.slots for chunk in chunks]
    context_keys, block_keys = keys.tensor_split((context_length,), dim=2)
    context_values, block_values = values.tensor_split((context_length,), dim=2)
    attended = []
    for chunk, query, *own in zip(
        chunks, *(x.split(sizes, dim=2) for x in (queries, block_keys, block_values)), strict=True
    ):
        given = (query, context_keys, context_values, *own, sinks)
        if chunk.lean:
            attended.append(checkpoint(chunk.attend, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            attended.append(chunk.attend(*given))
    return torch.cat(attended, dim=2)


def sample_lengths(positions: Tensor) -> list[int]:
    """Tokens of each sample of one row, from the ``positions`` [1, S] of its tokens in their samples."""
    ends = (positions[0].diff() != 1).nonzero()[:, 0] + 1
    return [end - start for start, end in itertools.pairwise([0, *ends.tolist(), positions.shape[1]])]


def _packed_attention(anchors: Tensor, positions: Tensor, block_size: int, sight: Sight, lean: bool) -> Attend:
    """`_dense_attention` sample by sample, for one row of several; all else of a layer runs over the whole row."""
    sizes = sample_lengths(positions)
    starts = [0, *itertools.accumulate(sizes)]
    ends = torch.tensor(starts[1:], device=anchors.device)
    counts = torch.searchsorted(anchors[0], ends).diff(prepend=ends.new_zeros(1)).tolist()
    slots = [count * block_size for count in counts]
    chunks = [
        _chunks(own - start, size, block_size, sight, lean, PACKED_BLOCKS) if own.shape[1] else []
        for own, start, size in zip(anchors.split(counts, dim=1), starts, sizes, strict=False)
    ]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None) -> Tensor:
        split = [part.split([*sizes, *slots], dim=2) for part in (keys, values)]  # contexts, then blocks
        attended = []
        for at, query in enumerate(queries.split(slots, dim=2)):
            if chunks[at]:
                own = [torch.cat((parts[at], parts[len(sizes) + at]), dim=2) for parts in split]
                attended.append(_dense_attention(chunks[at], sizes[at], query, own[0], own[1], sinks))
        return torch.cat(attended, dim=2)

    return attend


def _chunks(
    anchors: Tensor, context_length: int, block_size: int, sight: Sight, lean: bool, fewest: int = 1
) -> list[Chunk]:
    chunks = []
    for some in anchors.chunk(max(1, min(MASK_CHUNKS, anchors.shape[1] // fewest)), dim=1):
        last = min(int(some.max()), context_length)
        first = 0 if sight.reach is None else min(max(0, int(some.min()) - sight.reach), last)
        make = functools.partial(_dense_mask, some, slice(first, last), block_size, sight)
        mask = make if lean else functools.cache(make)
        chunks.append(Chunk(some.shape[1] * block_size, slice(first, last), mask, lean))
    return chunks


def _dense_mask(anchors: Tensor, seen: slice, block_size: int, sight: Sight) -> Tensor:
    """Bool [B, 1, a·γ, seen + a·γ]."""
    blocks, slots = (torch.arange(size, device=anchors.device) for size in (anchors.shape[1], block_size))
    place = torch.arange(seen.start, seen.stop, device=anchors.device) - anchors[:, :, None, None]  # [B, a, 1, seen]
    context = (place < 0) & sight.sees(slots[:, None], place)
    context = context.expand(-1, -1, block_size, -1).flatten(1, 2)[:, None]
    own = (blocks[:, None, None, None] == blocks[:, None]) & sight.sees(slots[:, None, None], slots)  # [a, γ, a, γ]
    own = own.expand(-1, block_size, -1, -1).flatten(2).flatten(0, 1).expand(len(anchors), 1, -1, -1)
    return torch.cat((context, own), dim=-1)


def _flex_attention(
    mask: BlockMask, queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None
) -> Tensor:
    attend = _compiled_flex_attention() if queries.is_cuda else flex_attention
    grouped = queries.shape[1] != keys.shape[1]
    if sinks is None:
        return attend(queries, keys, values, block_mask=mask, enable_gqa=grouped)
    # A sink takes its share e^s of the softmax's mass e^lse + e^s, and what it takes brings nothing.
    wanted = AuxRequest(lse=True)
    attended, found = attend(queries, keys, values, block_mask=mask, enable_gqa=grouped, return_aux=wanted)
    lse = cast("Tensor", found.lse)  # [B, heads, A·γ]
    return attended * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None].to(attended.dtype)


def _flex_mask(
    anchors: Tensor, context_length: int, block_size: int, sight: Sight, starts: Tensor | None = None
) -> BlockMask:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, slot = query // block_size, query % block_size
        anchor = anchors[row, block]
        context = (key < torch.minimum(anchor, torch.full_like(key, context_length))) & sight.sees(slot, key - anchor)
        if starts is not None:
            context = context & (key >= starts[row, block])
        of_block = key - context_length
        same = (key >= context_length) & (of_block // block_size == block)
        return context | (same & sight.sees(slot, of_block % block_size))

    slots = anchors.shape[1] * block_size
    return create_block_mask(visible, anchors.shape[0], None, slots, context_length + slots, device=anchors.device)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Uncompiled FlexAttention would build every score; sequence lengths change from batch to batch, hence dynamic.
    return torch.compile(flex_attention, dynamic=True)


# --- what decoding remembers ---


@dataclasses.dataclass
class DraftContext:
    """Keys and values of the verified positions of one or more rows, per layer. Belongs to the draft that made it."""

    looks_ahead: ClassVar[bool] = False  # whether it holds the token behind the last position, too

    lengths: list[int]  # verified positions per row
    layers: list[RaggedKV]
    forgotten: list[int]  # the first of them per row, which no slot sees any more

    @property
    def stored(self) -> list[int]:
        """Positions per row whose keys and values are there."""
        return [length - gone for length, gone in zip(self.lengths, self.forgotten, strict=True)]

    def keep_last(self, count: int, room: int) -> None:
        """Forget all but the last ``count`` stored positions of each row, unless so many and ``room`` more fit in twice
        ``count``: what is moved seldom costs little."""
        stored = self.stored
        if max(stored) + room <= 2 * count:
            return
        gone = [max(0, length - count) for length in stored]
        for kv in self.layers:
            kv.drop(gone, stored)
        self.forgotten = [before + more for before, more in zip(self.forgotten, gone, strict=True)]

    @property
    def size(self) -> int:
        """Bytes of the keys and values of the stored positions."""
        return sum(kv.size(max(self.stored)) for kv in self.layers)

    def select(self, rows: Sequence[int]) -> Self:
        """A copy with ``rows`` in that order."""
        stored = self.stored
        return dataclasses.replace(
            self,
            lengths=[self.lengths[row] for row in rows],
            layers=[kv.select(rows, max(stored[row] for row in rows)) for kv in self.layers],
            forgotten=[self.forgotten[row] for row in rows],
        )

    def join(self, other: Self) -> None:
        """Put the rows of ``other``, of the same draft, behind these."""
        for kv, new in zip(self.layers, other.layers, strict=True):
            kv.join(new, max(other.stored))
        self.lengths += other.lengths
        self.forgotten += other.forgotten

    def leave(self, row: int) -> None:
        """Take ``row`` out; the last row gets its place."""
        take_out(self.lengths, row)
        take_out(self.forgotten, row)
        for kv in self.layers:
            kv.leave(row, max(self.stored, default=0))


def context_bytes(config: DraftConfig, length: int, itemsize: int) -> int:
    """Bytes of the keys and values that decoding remembers of one row of ``length`` positions, or of the window's.

    `RaggedKV` reserves up to twice as much while it grows.
    """
    length = length if config.sliding_window is None else min(length, config.sliding_window - 1)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * itemsize


def far_bytes(config: DraftConfig, length: int, width: int) -> float:
    """Bytes that are kept of ``length`` positions before a stretch that is learnt from: [H], and keys and values."""
    if config.sliding_window is not None:
        length = min(length, config.sliding_window - 1)
    return width * length * config.hidden_size + context_bytes(config, length, width)


def activation_bytes(
    config: DraftConfig,
    rows: int,  # samples of a micro-batch
    length: int,  # tokens of each
    slots: int,  # of all their blocks
    answer_share: float,  # of the tokens, where anchors lie
    width: int,  # bytes of a number
    *,
    dense: bool,  # attention without FlexAttention
) -> float:
    """Bytes that the forward of a DSpark draft keeps for its backward.

    With N slots, K = context + slots: per layer N·(6·H + 4·heads + 3·SwiGLU) + K·(H + 4·keys); once
    context·(T+2)·H, and 2·N·H at the end. Dense attention also keeps per layer the masks in fp32 and the keys and
    values of every chunk of blocks; a chunk sees the context before its last anchor.
    """
    context, hidden, layers = rows * length, config.hidden_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    per_layer = slots * (6 * hidden + 4 * queries + 3 * config.intermediate_size)
    per_layer += (context + slots) * (hidden + 4 * keys)
    once = context * (config.num_taps + 2) * hidden + 2 * slots * hidden
    masks = 0.0
    if dense:
        seen = length * (1 - answer_share * (MASK_CHUNKS - 1) / (2 * MASK_CHUNKS))  # by the mean chunk
        masks = slots * (seen + slots / rows / MASK_CHUNKS)
        per_layer += 2 * keys * rows * (MASK_CHUNKS * seen - length)
    return width * (layers * per_layer + once) + (4 * layers + 1) * masks
