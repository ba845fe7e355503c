"""Mamba-1 state that can keep any prefix of a block: verify reads it, commit advances it by the accepted tokens only.

The recurrence of one channel (Gu & Dao 2023, "Mamba", algorithm 2), with step size Δ_t and A, B_t and C_t of one value
per state dimension:

    h_t = exp(A Δ_t) ⊙ h_{t-1} + Δ_t x_t B_t          y_t = C_t·h_t + D x_t

Every channel and dimension decays at its own rate, so there is no quadratic form as in Mamba-2: a short block is walked
token by token, a long one in pieces that walk side by side, twice. The first walk, from nothing, gives with the decay
over each piece the states that the pieces start in; the second goes from there.

A block records x, Δ and B, and the state behind its last token. Keeping a whole block is taking that state; keeping a
prefix is walking it from the committed state, all layers at once, with Δ = 0 for what a row rejects.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_dspark.targets import recurrent
from nemotron_dspark.targets.recurrent import LayerStates, NewRecurrent, advance_window, convolve, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec

_PIECE = 16  # tokens walked one after the other


@dataclasses.dataclass
class _BlockRecord:  # what one layer's block leaves behind until it is committed
    conv_inputs: Tensor  # [B, m, channels], before the convolution
    x: Tensor  # [B, m, channels] fp32
    b: Tensor  # [B, m, state] fp32
    dt: Tensor  # [B, m, channels] fp32
    a: Tensor  # [1, channels, state] fp32, the layer's own
    behind: Tensor  # [B, channels, state] fp32, h_m


@dataclasses.dataclass
class Mamba1States(LayerStates):
    """The committed states of every Mamba-1 layer of a target, for B rows."""

    ssm: Tensor  # [L, B, channels, state] fp32

    @staticmethod
    def shapes(mixer: Any) -> tuple[tuple[int, ...], ...]:
        channels = mixer.intermediate_size
        return (mixer.conv_kernel_size - 1, channels), (channels, mixer.ssm_state_size)

    def commit(self, kept: Sequence[int]) -> None:
        block = self.take_records()
        conv, ssm = self.tensors()
        conv.copy_(advance_window(conv, block.conv_inputs, kept))
        if min(kept) == block.dt.shape[2]:
            ssm.copy_(block.behind)
            return
        count = max(kept)
        steps = torch.arange(count, device=block.dt.device)
        inside = steps < torch.tensor(kept, device=block.dt.device)[:, None]  # [B, n]
        dt = block.dt[:, :, :count] * inside[..., None]
        _, behind = _walk(block.x[:, :, :count], dt, block.a, block.b[:, :, :count], None, ssm)
        ssm.copy_(behind)


def _walk(
    x: Tensor,  # [..., m, channels]
    dt: Tensor,  # [..., m, channels]
    a: Tensor,  # [..., channels, state]
    b: Tensor,  # [..., m, state]
    c: Tensor | None,  # [..., m, state]; None when the outputs are not wanted
    state: Tensor,  # [..., channels, state], h_0; not written
) -> tuple[list[Tensor], Tensor]:
    """C_t·h_t [..., channels] for every t, one token after the other, and h_m."""
    outputs = []
    added = dt * x
    for at in range(dt.shape[-2]):
        state = torch.exp(dt[..., at, :, None] * a) * state + added[..., at, :, None] * b[..., at, None, :]
        if c is not None:
            outputs.append((state @ c[..., at, :, None])[..., 0])
    return outputs, state


def scan_block(
    x: Tensor,  # [B, m, channels] fp32
    dt: Tensor,  # [B, m, channels] fp32, after softplus
    a: Tensor,  # [channels, state] fp32, negative
    b: Tensor,  # [B, m, state] fp32
    c: Tensor,  # [B, m, state] fp32
    state: Tensor,  # [B, channels, state] fp32, h_0; not written
) -> tuple[Tensor, Tensor]:
    """C_t·h_t [B, m, channels] of a block that starts in ``state``, and h_m [B, channels, state]."""
    block = dt.shape[1]
    if block <= _PIECE:
        outputs, behind = _walk(x, dt, a, b, c, state)
        return torch.stack(outputs, dim=1), behind
    missing = -block % _PIECE  # a step of size 0 changes nothing
    x, dt, b, c = (F.pad(part, (0, 0, 0, missing)).unflatten(1, (-1, _PIECE)) for part in (x, dt, b, c))
    _, local = _walk(x, dt, a, b, None, torch.zeros_like(state)[:, None])  # [B, pieces, channels, state]
    decay = torch.exp(dt.sum(2)[..., None] * a)  # [B, pieces, channels, state]
    starts = [state]
    for piece in range(local.shape[1] - 1):
        starts.append(decay[:, piece] * starts[-1] + local[:, piece])
    outputs, behind = _walk(x, dt, a, b, c, torch.stack(starts, dim=1))
    return torch.stack(outputs, dim=2).flatten(1, 2)[:, :block], behind[:, -1]


def block_forward(mixer: Any, hidden: Tensor, states: Mamba1States, layer: int) -> Tensor:
    """Jamba's Mamba-1 mixer on a block [B, m, H] behind the committed tokens; records, commits nothing.

    Same computation as the mixer's own forward: in_proj, causal convolution, norms of Δ, B and C, scan, gate, out_proj.
    """
    window, state = states.of(layer)
    inputs, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
    x = mixer.act(convolve(window, inputs, mixer.conv1d).to(hidden.dtype))  # [B, m, channels]
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, b, c = mixer.x_proj(x).split(sizes, dim=-1)
    dt = F.linear(mixer.dt_layernorm(dt), mixer.dt_proj.weight).float() + mixer.dt_proj.bias.float()
    x, dt, a = x.float(), F.softplus(dt), -torch.exp(mixer.A_log.float())
    b, c = mixer.b_layernorm(b).float(), mixer.c_layernorm(c).float()
    y, behind = scan_block(x, dt, a, b, c, state)
    states.record(layer, _BlockRecord(inputs, x, b, dt, a[None], behind))
    y = (y + x * mixer.D.float()) * F.silu(gate)
    return mixer.out_proj(y.to(hidden.dtype))


def prepare(model: nn.Module, spec: TargetSpec, *, paths: Mapping[LayerKind, str]) -> NewRecurrent | None:
    """`recurrent.prepare` of Mamba-1 mixers: Jamba's and Falcon-Mamba's norm Δ, B and C, Mamba's take them as they are.

    transformers starts Jamba's scan of several tokens from nothing even when its cache holds a state; this does not.
    """
    for mixer in mixers_of(model, spec, paths).values():
        for norm in ("dt_layernorm", "b_layernorm", "c_layernorm"):
            if not hasattr(mixer, norm):
                setattr(mixer, norm, nn.Identity())
    return recurrent.prepare(model, spec, paths=paths, states=Mamba1States, block_forward=block_forward)
