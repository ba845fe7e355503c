"""The draft's decoder layer: Qwen3's, with keys and values that also come from the target's context.

Two ways through the same weights: `Layer.forward` for many blocks with known context (training), `Layer.decode` for one
block per row over stored keys and values.

Parameters may be of another type than what is computed: every module casts its own to its input's type where it uses
them. So fp32 parameters train in bf16 arithmetic, their gradients add up in fp32, and no copy of them is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_dspark.drafts.attention import BlockAttention
from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.targets.kv import RaggedKV

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, [..., positions, d]


class Linear(nn.Linear):
    """A linear map in its input's type, whatever type its parameters have."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, *self.cast_parameters(x.dtype))

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
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        query_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

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
        attend: BlockAttention,
    ) -> Tensor:
        """[B, A·γ, heads·d], before the output projection."""
        # One matrix product per projection; context and blocks pass through the same weights.
        source = torch.cat((context, hidden), dim=1)
        keys = self.k_proj(source).unflatten(-1, (self.kv_heads, self.head_dim))
        keys = rotate(self.k_norm(keys).transpose(1, 2), all_rotation)
        values = self.v_proj(source).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return attend(self.queries(hidden, block_rotation), keys, values).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) ⊙ up; the way back computes silu(gate) again, where autograd would keep it: a third of what the widest
    activations take."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # [..., SwiGLU size] each
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


class Layer(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,  # [B, A·γ, H]
        context: Tensor,  # [B, S, H]
        block_rotation: Rotation,
        all_rotation: Rotation,
        attend: BlockAttention,
    ) -> Tensor:
        """[B, A·γ, H]."""
        attended = self.self_attn(self.input_layernorm(hidden), context, block_rotation, all_rotation, attend)
        return self._finish(hidden, attended)

    def decode(
        self,
        hidden: Tensor,  # [B, γ, H]
        rotation: Rotation,  # [B or 1, 1, γ, d] at the block's positions
        key_value_weight: Tensor,  # [2·kv_heads·d, H], k_proj over v_proj
        stored: RaggedKV,
        starts: Sequence[int],  # verified positions per row
        mask: Tensor | None,  # bool [B, 1, 1, max(starts) + γ]; None when all rows have the same length
    ) -> Tensor:
        """[B, γ, H]. The block's own keys lie behind the stored ones and are overwritten by what comes next."""
        attention = self.self_attn
        rows, slots, _ = hidden.shape
        normed = self.input_layernorm(hidden)
        projected = functional.linear(normed, key_value_weight).view(rows, slots, 2, attention.kv_heads, -1)
        keys = rotate(attention.k_norm(projected[:, :, 0]).transpose(1, 2), rotation)
        keys, values = stored.write(keys, projected[:, :, 1].transpose(1, 2), starts)
        # Every slot sees the same keys, so the query heads of one key head fold into one longer query.
        queries = attention.queries(normed, rotation).reshape(rows, attention.kv_heads, -1, attention.head_dim)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        attended = attended.view(rows, attention.heads, slots, -1).transpose(1, 2).flatten(2)
        return self._finish(hidden, attended)

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
