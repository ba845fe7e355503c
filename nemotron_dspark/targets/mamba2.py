"""Mamba-2 state that can keep any prefix of a block: verify reads it, commit advances it by the accepted tokens only.

The recurrence of one head (Dao & Gu 2024, "Transformers are SSMs", eq. 1 with scalar A), with Δ_t the step size:

    S_t = exp(A Δ_t) S_{t-1} + Δ_t x_t ⊗ B_t          y_t = S_t C_t + D x_t

Over a block of m tokens, with c_t = A Σ_{s≤t} Δ_s (the paper's quadratic, "dual" form):

    y_t = exp(c_t) S_0 C_t + Σ_{s≤t} exp(c_t - c_s) (C_t·B_s) Δ_s x_s + D x_t
    S_n = exp(c_n) S_0 + Σ_{s≤n} exp(c_n - c_s) Δ_s x_s ⊗ B_s          for any accepted prefix n

So verifying never writes S_0, and S_n for any n needs only the block's own x, B and Δ, which are small. Nothing is
copied back, and no weight is read a second time. The sums c are float64: a head that forgets fast brings them to
thousands within a prompt's chunk, where float32 differences would be off in the fourth digit.
"""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_dspark.targets import recurrent
from nemotron_dspark.targets.recurrent import (
    LayerStates,
    NewRecurrent,
    advance_window,
    convolve,
    mixers_of,
    prefix_decay,
)
from nemotron_dspark.targets.spec import LayerKind, TargetSpec


@dataclasses.dataclass
class _BlockRecord:  # what one layer's block leaves behind until it is committed
    conv_inputs: Tensor  # [B, m, channels], before the convolution
    x: Tensor  # [B, m, heads, head_dim] fp32
    b: Tensor  # [B, m, groups, state] fp32
    dt: Tensor  # [B, m, heads] fp32
    decay: Tensor  # [B, m, heads] fp64, c_t


@dataclasses.dataclass
class Mamba2States(LayerStates):
    """The committed states of every Mamba-2 layer of a target, for B rows."""

    ssm: Tensor  # [L, B, heads, head_dim, state] fp32

    @staticmethod
    def shapes(mixer: Any) -> tuple[tuple[int, ...], ...]:
        conv = (mixer.conv_kernel_size - 1, mixer.conv_dim)
        return conv, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)

    def commit(self, kept: Sequence[int]) -> None:
        block = self.take_records()
        if max(kept) == 0:
            return
        conv, ssm = self.tensors()
        conv.copy_(advance_window(conv, block.conv_inputs, kept))
        total, decay = prefix_decay(block.decay, kept)  # [L, B, heads], [L, B, n, heads]
        count, groups = decay.shape[2], block.b.shape[3]
        weight = _decayed(decay) * block.dt[:, :, :count]
        weighted = (block.x[:, :, :count] * weight[..., None]).unflatten(3, (groups, -1)).flatten(4)
        left = weighted.transpose(2, 3).flatten(1, 2).mT  # [L, B·groups, heads/groups·head_dim, n]
        right = block.b[:, :, :count].transpose(2, 3).flatten(1, 2)  # [L, B·groups, n, state]
        # In place: the states are large, and a sum in a tensor of its own would move them twice more.
        ssm.mul_(_decayed(total)[..., None, None])
        for states, each_left, each_right in zip(ssm, left, right, strict=True):
            states.view(each_left.shape[0], -1, ssm.shape[-1]).baddbmm_(each_left, each_right)


def _decayed(exponent: Tensor) -> Tensor:
    """fp32 exp of fp64 log decays; 0 below 1e-26: it adds nothing, and products of it are denormal, slow on a CPU."""
    return F.threshold(torch.exp(exponent.float()), 1e-26, 0.0)


def scan_block(
    x: Tensor,  # [B, m, heads, head_dim] fp32
    dt: Tensor,  # [B, m, heads] fp32, after softplus
    decay: Tensor,  # [B, m, heads] fp64, c_t
    b: Tensor,  # [B, m, groups, state] fp32
    c: Tensor,  # [B, m, groups, state] fp32
    skip: Tensor,  # [heads] fp32, D
    state: Tensor,  # [B, heads, head_dim, state] fp32, S_0; not written
) -> Tensor:
    """Outputs y [B, m, heads, head_dim] of a block that starts in ``state`` (the formula above)."""
    block = x.shape[1]
    groups = b.shape[2]
    from_state = torch.einsum("bmgn,bghpn->bmghp", c, state.unflatten(1, (groups, -1))).flatten(2, 3)
    y = from_state * _decayed(decay)[..., None]
    scores = torch.einsum("bmgn,bsgn->bgms", c, b)  # [B, groups, m, m]
    relative = decay.transpose(1, 2)  # [B, heads, m]
    future = torch.ones(block, block, dtype=torch.bool, device=x.device).triu(1)
    lower = _decayed((relative[..., :, None] - relative[..., None, :]).masked_fill(future, -torch.inf))
    mixing = lower.unflatten(1, (groups, -1)) * scores[:, :, None]  # [B, groups, heads/groups, m, m]
    inner = mixing.flatten(1, 2) @ (x * dt[..., None]).transpose(1, 2)  # [B, heads, m, head_dim]
    return y + inner.transpose(1, 2) + x * skip[:, None]


Project = Callable[[Any, Tensor], Tensor]  # mixer, hidden [B, m, H] -> gate, convolution inputs and dt side by side
GatedNorm = Callable[[Any, Tensor, Tensor], Tensor]  # mixer, y [B, m, heads·head_dim] fp32, gate -> the same shape


def block_forward(
    mixer: Any,
    hidden: Tensor,  # [B, m, H]
    states: Mamba2States,
    layer: int,
    project: Project | None = None,  # None: in_proj alone
    gated_norm: GatedNorm | None = None,  # None: the mixer's norm
) -> Tensor:
    """A Mamba-2 mixer of `transformers` on a block after the committed tokens [B, m, H]; records, commits nothing.

    Same computation as the mixer's own forward: in_proj, causal convolution, scan, gated norm, out_proj.
    """
    rows, block, _ = hidden.shape
    window, state = states.of(layer)
    projected = project(mixer, hidden) if project else mixer.in_proj(hidden)
    gate, inputs, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    convolved = mixer.act(convolve(window, inputs, mixer.conv1d).to(hidden.dtype)).float()  # [B, m, channels]
    width = mixer.n_groups * mixer.ssm_state_size
    x, b, c = convolved.split([mixer.intermediate_size, width, width], dim=-1)
    x = x.reshape(rows, block, mixer.num_heads, mixer.head_dim)
    b = b.reshape(rows, block, mixer.n_groups, mixer.ssm_state_size)
    c = c.reshape(rows, block, mixer.n_groups, mixer.ssm_state_size)
    dt = F.softplus(dt.float() + mixer.dt_bias.float())
    low, high = mixer.time_step_limit
    if low > 0 or high < float("inf"):
        dt = dt.clamp(low, high)
    decay = (dt * -torch.exp(mixer.A_log.float())).double().cumsum(1)
    y = scan_block(x, dt, decay, b, c, mixer.D.float(), state)
    states.record(layer, _BlockRecord(inputs, x, b, dt, decay))
    y = y.reshape(rows, block, -1)
    normed = gated_norm(mixer, y, gate) if gated_norm else mixer.norm(y, gate)
    return mixer.out_proj(normed.to(hidden.dtype))


def prepare(
    model: torch.nn.Module,
    spec: TargetSpec,
    *,
    paths: Mapping[LayerKind, str],
    project: Project | None = None,
    gated_norm: GatedNorm | None = None,
) -> NewRecurrent | None:
    """`recurrent.prepare` of Mamba-2 mixers.

    The step size keeps the limits that the config states, [0, inf] in most published ones or where it states none, on
    blocks of any length and, set on the mixer, in its own forward on whole sequences, so that all agree. transformers
    clamps it in its chunked form (Nemotron-H's and Zamba2's at ``time_step_min``, a value for initialisation) and not
    in its one-token form; engines and the kernels that the checkpoints were trained with never do. What no fp32 can
    hold, as the 1e308 of one Nemotron, means no bound: torch refuses to clamp at it.
    """
    low, high = map(float, getattr(model.config, "time_step_limit", None) or (0.0, float("inf")))
    if high > torch.finfo(torch.float32).max:
        high = float("inf")
    for mixer in mixers_of(model, spec, paths).values():
        mixer.time_step_limit = (low, high)
    forward = functools.partial(block_forward, project=project, gated_norm=gated_norm)
    return recurrent.prepare(model, spec, paths=paths, states=Mamba2States, block_forward=forward)


_CHUNK = 64  # positions: the parts of transformers' scan that grow with the chunk, and those that shrink, balance here


def even_chunk(size: int, length: int) -> int:
    """Positions of a chunk when ``length`` of them are cut into the fewest equal chunks of at most ``size`` and 64."""
    return -(-length // -(-length // min(size, _CHUNK)))


@contextlib.contextmanager
def even_chunks(model: torch.nn.Module, length: int) -> Iterator[None]:
    """Let the Mamba-2 mixers of ``model``, if it has any, scan ``length`` tokens in equal chunks.

    transformers would fill the last one up to its full size, in the middle of the usual lengths at the cost of a fifth.
    Any chunk gives the same states up to rounding. A kernel's scan, which only GPUs have, is left alone.
    """
    kernels = any(importlib.util.find_spec(name) for name in ("mamba_ssm", "kernels"))
    mixers: list[Any] = [] if kernels and next(model.parameters()).device.type != "cpu" else [*model.modules()]
    sizes = {its: its.chunk_size for its in mixers if hasattr(its, "chunk_size") and hasattr(its, "ssm_state_size")}
    try:
        for mixer, size in sizes.items():
            mixer.chunk_size = even_chunk(size, length)
        yield
    finally:
        for mixer, size in sizes.items():
            mixer.chunk_size = size
