"""Gated delta rule state that can keep any prefix of a block: verify reads it, commit advances it by what is accepted.

The recurrence of one head (Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks"), with log decay g_t ≤ 0, step size
β_t, unit keys, and S of shape [key, value]:

    u_t = β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)      S_t = exp(g_t) S_{t-1} + k_t ⊗ u_t      y_t = S_tᵀ q_t

Over a block of m tokens, with c_t = Σ_{s≤t} g_s, put S_{t-1} in terms of S_0 and of the u before t (the chunkwise WY
form, its triangular system kept as one):

    u_t + β_t Σ_{s<t} exp(c_t - c_s) (k_t·k_s) u_s = β_t (v_t - exp(c_t) S_0ᵀ k_t)
    y_t = exp(c_t) S_0ᵀ q_t + Σ_{s≤t} exp(c_t - c_s) (q_t·k_s) u_s
    S_n = exp(c_n) S_0 + Σ_{s≤n} exp(c_n - c_s) k_s ⊗ u_s          for any accepted prefix n

No u_s depends on a later token, so u, k and c are all that a commit needs: S_0 is not written before, and no weight is
read a second time. The sums c are float64: a head that forgets fast brings them to thousands within a prompt's chunk,
where float32 differences would be off in the fourth digit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_dspark.targets.recurrent import LayerStates, advance_window, convolve, prefix_decay


@dataclasses.dataclass
class _BlockRecord:  # what one layer's block leaves behind until it is committed
    conv_inputs: Tensor  # [B, m, channels], before the convolution
    keys: Tensor  # [B, m, heads, key] fp32
    updates: Tensor  # [B, m, heads, value] fp32, u_t
    decay: Tensor  # [B, m, heads] fp64, c_t


@dataclasses.dataclass
class DeltaStates(LayerStates):
    """The committed states of every gated delta net of a target, for B rows."""

    delta: Tensor  # [L, B, heads, key, value] fp32

    @staticmethod
    def shapes(mixer: Any) -> tuple[tuple[int, ...], ...]:
        conv = (mixer.conv_kernel_size - 1, mixer.conv_dim)
        return conv, (mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)

    def commit(self, kept: Sequence[int]) -> None:
        block = self.take_records()
        conv, delta = self.tensors()
        conv.copy_(advance_window(conv, block.conv_inputs, kept))
        total, decay = prefix_decay(block.decay, kept)  # [L, B, heads], [L, B, n, heads]
        count = decay.shape[2]
        updates = block.updates[:, :, :count] * torch.exp(decay.float())[..., None]
        added = torch.einsum("lbmhk,lbmhv->lbhkv", block.keys[:, :, :count], updates)
        delta.mul_(torch.exp(total.float())[..., None, None]).add_(added)


def delta_block(
    queries: Tensor,  # [B, m, heads, key] fp32, scaled
    keys: Tensor,  # [B, m, heads, key] fp32, of unit length
    values: Tensor,  # [B, m, heads, value] fp32
    beta: Tensor,  # [B, m, heads] fp32
    decay: Tensor,  # [B, m, heads] fp64, c_t
    state: Tensor,  # [B, heads, key, value] fp32, S_0; not written
) -> tuple[Tensor, Tensor]:
    """Outputs y and updates u, both [B, m, heads, value], of a block that starts in ``state`` (the formulas above)."""
    queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))  # [B, heads, m, …]
    beta, decay = beta.transpose(1, 2)[..., None], decay.transpose(1, 2)  # [B, heads, m, 1], [B, heads, m]
    block = keys.shape[2]
    future = torch.ones(block, block, dtype=torch.bool, device=keys.device).triu(1)
    difference = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf)
    lower = torch.exp(difference.float())  # [B, heads, m, m]
    since_start = torch.exp(decay.float())[..., None]
    system = beta * (keys @ keys.mT) * lower  # its diagonal is taken as one
    known = beta * (values - since_start * (keys @ state))
    updates = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    y = since_start * (queries @ state) + ((queries @ keys.mT) * lower) @ updates
    return y.transpose(1, 2), updates.transpose(1, 2)


def block_forward(mixer: Any, hidden: Tensor, states: DeltaStates, layer: int) -> Tensor:
    """A gated delta net of `transformers` on a block [B, m, H] behind the committed tokens; records, commits nothing.

    Same computation as the mixer's own forward: projections, causal convolution, delta rule, gated norm, out_proj.
    """
    from transformers.activations import ACT2FN  # slow to import, and loaded by now

    rows, block, _ = hidden.shape
    window, state = states.of(layer)
    inputs, gate, beta, dt = _project(mixer, hidden)
    convolved = ACT2FN[mixer.activation](convolve(window, inputs, mixer.conv1d).to(hidden.dtype)).float()
    queries, keys, values = convolved.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    queries = _unit(queries.reshape(rows, block, mixer.num_k_heads, mixer.head_k_dim)) * mixer.head_k_dim**-0.5
    keys = _unit(keys.reshape(rows, block, mixer.num_k_heads, mixer.head_k_dim))
    shared = mixer.num_v_heads // mixer.num_k_heads  # value heads that read with one query and key head
    queries, keys = queries.repeat_interleave(shared, dim=2), keys.repeat_interleave(shared, dim=2)
    values = values.reshape(rows, block, mixer.num_v_heads, mixer.head_v_dim)
    decay = (-torch.exp(mixer.A_log.float()) * F.softplus(dt.float() + mixer.dt_bias)).double().cumsum(1)
    y, updates = delta_block(queries, keys, values, beta.sigmoid().float(), decay, state)
    states.record(layer, _BlockRecord(inputs, keys, updates, decay))
    normed = mixer.norm(y.to(hidden.dtype).reshape(-1, mixer.head_v_dim), gate.reshape(-1, mixer.head_v_dim))
    return mixer.out_proj(normed.reshape(rows, block, -1))


def _project(mixer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The convolution's inputs [B, m, channels], the gate, and β and Δ before their activations [B, m, heads]."""
    if hasattr(mixer, "in_proj_qkv"):  # Qwen3.5: four projections
        projections = (mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a)
        return tuple(projection(hidden) for projection in projections)
    parts = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(hidden), mixer.in_proj_ba(hidden))
    queries, keys, values, gate, beta, dt = parts  # the first four are [B, m, heads, …]
    return torch.cat([part.flatten(2) for part in (queries, keys, values)], dim=-1), gate, beta, dt


def _unit(vectors: Tensor) -> Tensor:
    """``vectors`` over their lengths, with the small number that the kernels add under the root."""
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)
