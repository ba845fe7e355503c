"""Kernels compared with plain PyTorch on one small random case, each in a process of its own.

A kernel that imports may still compute wrong numbers: binaries built for a neighbouring architecture have done so
(causal-conv1d 105). And one that crashes takes its process with it, so `python -m nemotron_dspark.recipe.gpu_proofs
NAME` runs one proof and prints its `KernelProof` as JSON. The references are loops over time in fp64.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_dspark.drafts.layers import Sight, block_attention
from nemotron_dspark.recipe.probes import KernelProof

# Largest difference over the reference's largest magnitude. fp32 kernels may multiply in TF32 (10 bits), bf16 has 8.
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 3e-2}
_ROWS, _TIME, _HEADS, _WIDTH, _GROUPS, _STATE, _CHUNK = 2, 96, 4, 64, 2, 128, 64
_NCCL_SECONDS = 60


def mamba_ssm(scan: Callable[..., Any], update: Callable[..., Any], device: str) -> KernelProof:
    """``mamba_chunk_scan_combined`` over whole sequences and ``selective_state_update`` of one token more."""

    def differences(dtype: torch.dtype) -> Iterator[float]:
        x = _random(device, dtype, _ROWS, _TIME + 1, _HEADS, _WIDTH)
        dt = _random(device, dtype, _ROWS, _TIME + 1, _HEADS)
        b, c = (_random(device, dtype, _ROWS, _TIME + 1, _GROUPS, _STATE) for _ in range(2))
        a = -torch.rand(_HEADS, device=device) - 0.5
        skip, bias = torch.rand(_HEADS, device=device), torch.rand(_HEADS, device=device) - 2
        outputs, states = scan_by_steps(x, dt, a, b, c, skip, bias)
        inputs = (x[:, :-1], dt[:, :-1], a, b[:, :-1], c[:, :-1])
        options = {"D": skip, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
        y, final = scan(*(part.contiguous() for part in inputs), chunk_size=_CHUNK, **options)
        yield _difference(y, outputs[:, :-1])
        yield _difference(final, states[-2])
        state = states[-2].float()
        per_head = (_HEADS, _WIDTH)
        y = update(
            state,
            x[:, -1].contiguous(),
            dt[:, -1, :, None].expand(_ROWS, *per_head),
            a[:, None, None].expand(*per_head, _STATE),
            b[:, -1].contiguous(),
            c[:, -1].contiguous(),
            D=skip[:, None].expand(per_head),
            dt_bias=bias[:, None].expand(per_head),
            dt_softplus=True,
        )
        yield _difference(y, outputs[:, -1])
        yield _difference(state, states[-1])

    return _worst("mamba_chunk_scan_combined and selective_state_update", differences)


def causal_conv1d(convolve: Callable[..., Any], update: Callable[..., Any], device: str) -> KernelProof:
    """``causal_conv1d_fn`` over whole sequences and ``causal_conv1d_update`` of one token more, with bias and SiLU."""

    def differences(dtype: torch.dtype) -> Iterator[float]:
        x = _random(device, dtype, _ROWS, _TIME + 1, _WIDTH).transpose(1, 2)  # [B, channels, time], channels last
        weight, bias = _random(device, dtype, _WIDTH, 4), _random(device, dtype, _WIDTH)
        padded = F.pad(x.double(), (3, 0))  # the reference: a sum over the four taps of the filter
        taps = (padded[:, :, tap : tap + _TIME + 1] * weight[:, tap, None].double() for tap in range(4))
        outputs = F.silu(sum(taps, bias[:, None].double()))
        yield _difference(convolve(x[:, :, :-1], weight, bias, activation="silu"), outputs[:, :, :-1])
        window = x[:, :, -5:-1].contiguous()
        yield _difference(update(x[:, :, -1].contiguous(), window, weight, bias, "silu"), outputs[:, :, -1])

    return _worst("causal_conv1d_fn and causal_conv1d_update", differences)


def flex_attention(device: str) -> KernelProof:
    """FlexAttention, compiled on a GPU, as a training forward calls it, against dense attention in fp64."""
    context, block = 160, 4
    anchors = torch.tensor([[3, 40, 90, 150], [1, 64, 65, 159]], device=device)

    def differences(dtype: torch.dtype) -> Iterator[float]:
        slots = anchors.shape[1] * block
        queries = _random(device, dtype, 2, 4, slots, 64)
        keys, values = (_random(device, dtype, 2, 2, context + slots, 64) for _ in range(2))
        for sight, sinks in ((Sight(), None), (Sight(48, causal=True), _random(device, dtype, 4))):
            flex, dense = (block_attention(anchors, context, block, kind, sight) for kind in ("flex", "dense"))
            wide = None if sinks is None else sinks.double()
            expected = dense(queries.double(), keys.double(), values.double(), wide)
            yield _difference(flex(queries, keys, values, sinks), expected)

    return _worst("compiled FlexAttention", differences)


def all_reduce(rank: int, port: int) -> KernelProof:
    """A sum between two GPUs by NCCL; this is process ``rank`` of two."""
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    limit = datetime.timedelta(seconds=_NCCL_SECONDS)
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)
    values = torch.arange(1 << 20, device="cuda", dtype=torch.float32) * (rank + 1)
    dist.all_reduce(values)
    error = _difference(values, torch.arange(1 << 20, device="cuda", dtype=torch.float64) * 3)
    dist.destroy_process_group()
    return KernelProof("a sum of 4 MB between two GPUs by NCCL", error, 1e-6)


def scan_by_steps(
    x: Tensor,  # [B, T, heads, width]
    dt: Tensor,  # [B, T, heads], before bias and softplus
    a: Tensor,  # [heads]
    b: Tensor,  # [B, T, groups, state]
    c: Tensor,  # [B, T, groups, state]
    skip: Tensor,  # [heads], D
    bias: Tensor,  # [heads], of dt
) -> tuple[Tensor, list[Tensor]]:
    """Outputs [B, T, heads, width] and the state [B, heads, width, state] after each token, in fp64.

    S_t = exp(A Δ_t) S_{t-1} + Δ_t x_t ⊗ B_t, y_t = S_t C_t + D x_t (Dao & Gu 2024, eq. 1), one token after the other.
    """
    x, dt, a, b, c, skip, bias = (part.double() for part in (x, dt, a, b, c, skip, bias))
    heads = x.shape[2]
    b, c = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (b, c))
    step = F.softplus(dt + bias)
    state = x.new_zeros(x.shape[0], heads, x.shape[3], b.shape[3])
    outputs, states = [], []
    for t in range(x.shape[1]):
        state = state * torch.exp(a * step[:, t])[..., None, None]
        state = state + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        outputs.append((state * c[:, t, :, None, :]).sum(-1) + skip[:, None] * x[:, t])
        states.append(state)
    return torch.stack(outputs, dim=1), states


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def _worst(what: str, differences: Callable[[torch.dtype], Iterator[float]]) -> KernelProof:
    """The proof in fp32 and bf16; of the two, the one that is nearer to its tolerance or beyond it."""
    proofs = []
    for dtype, tolerance in TOLERANCES.items():
        torch.manual_seed(0)
        errors = torch.tensor([*differences(dtype)])
        error = float(errors.max())  # NaN if any is
        proofs.append(KernelProof(f"{what} in {str(dtype).removeprefix('torch.')}", error, tolerance))
    return next((proof for proof in proofs if not proof.passed), max(proofs, key=lambda p: p.error / p.tolerance))


def main(name: str, *arguments: str) -> KernelProof:
    """The proof ``name`` with the installed kernels, on the first GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels fail, unless a test has replaced them
    if name == "mamba-ssm":
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # type: ignore[import-not-found]
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

        return mamba_ssm(mamba_chunk_scan_combined, selective_state_update, device)
    if name == "causal-conv1d":
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # type: ignore[import-not-found]

        return causal_conv1d(causal_conv1d_fn, causal_conv1d_update, device)
    return flex_attention(device) if name == "flex-attention" else all_reduce(*map(int, arguments))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(main(*sys.argv[1:]))) + "\n")
