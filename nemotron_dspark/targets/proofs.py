"""Proofs that a loaded target computes what every later stage relies on. Seconds now instead of a lost week later.

Each proof compares two ways to the same number on random tokens and knows what it means when they differ. None trusts
a version number: kernels, patches and remote code all change what a version computes.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron_dspark.errors import CheckError
from nemotron_dspark.targets.target import Target

_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class ProofResult:
    name: str
    passed: bool
    error: float  # relative error of the worst position (fp32) or of a typical one (half precision)
    tolerance: float
    seconds: float
    cause: str  # what it means when it fails
    cure: str


@dataclasses.dataclass(frozen=True)
class _Proof:
    name: str
    measure: Callable[[Target, Tensor, Sequence[int]], float]
    cause: str
    cure: str
    half_tolerance: float = 0.1  # blocks and sequences round differently


def _relative(found: Tensor, expected: Tensor, quantile: float = 0.5) -> float:
    """Relative error over the last dimension: of the worst position in fp32, of the ``quantile`` in half precision.

    Half precision rounds differently in a block than in a sequence, and a router near a tie may then pick another
    expert for single tokens; a broken state or mask moves every position.
    """
    error = (found.float() - expected.float()).norm(dim=-1)
    scale = expected.float().norm(dim=-1).clamp_min(1e-6)
    positions = (error / scale).flatten()
    if not bool(torch.isfinite(positions).all()):
        return float("inf")
    return float(positions.max() if found.dtype == torch.float32 else positions.quantile(quantile))


def _chunk(target: Target) -> int:
    return int(getattr(target.model.config, "chunk_size", None) or getattr(target.model.config, "mamba_chunk_size", 64))


def _causality(target: Target, ids: Tensor, taps: Sequence[int]) -> float:
    kept = 2 * _chunk(target) + 4  # the prefix crosses borders itself, and one lies behind it
    changed = ids.clone()
    changed[:, kept:] = (changed[:, kept:] + 1) % target.spec.vocab_size
    whole, other = target.capture(ids, None, taps), target.capture(changed, None, taps)
    return _relative(other.last[:, :kept], whole.last[:, :kept], quantile=0.9)  # a leak may reach back one chunk only


def _taps(target: Target, ids: Tensor, taps: Sequence[int]) -> float:
    """Taps against the residual stream rebuilt from outside: what enters the next layer is what left the tapped one."""
    captured = target.capture(ids, None, taps).taps.chunk(len(taps), dim=-1) if taps else ()
    layers = target.model.get_submodule(target.spec.names.layers)
    entering: dict[int, Tensor] = {}
    handles = []
    for tap in taps:

        def keep(_module, args, kwargs, at=tap):
            entering[at] = args[0] if args else kwargs["hidden_states"]

        handles.append(layers[tap + 1].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        target.capture(ids, None, ())
    finally:
        for handle in handles:
            handle.remove()
    return max((_relative(tapped, entering[tap]) for tap, tapped in zip(taps, captured, strict=True)), default=0.0)


def _head(target: Target, ids: Tensor, taps: Sequence[int]) -> float:
    with torch.no_grad():
        logits = target.model(input_ids=ids, use_cache=False).logits
    return _relative(target.logits(target.capture(ids, None, ()).last), logits.float())


def _padding(target: Target, ids: Tensor, taps: Sequence[int]) -> float:
    kept = _chunk(target) + 3
    padded = torch.stack([ids[0], ids[0]])
    padded[1, kept:] = 0
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[1, kept:] = False
    alone = target.capture(ids[:, :kept], None, taps)
    both = target.capture(padded, mask, taps)
    return max(
        _relative(both.last[1:, :kept], alone.last),
        _relative(both.last[:1], target.capture(ids, None, taps).last),
    )


def _rollback(target: Target, ids: Tensor, taps: Sequence[int]) -> float:
    prompt = _chunk(target) + 5
    fresh = target.capture(ids, None, taps).last
    state, _ = target.prefill(ids[0, :prompt].tolist(), taps)
    worst = 0.0
    at = prompt
    for kept in (0, 3, 1, _BLOCK):
        block = ids[:, at : at + _BLOCK].clone()
        block[:, kept:] = block[:, kept:].flip(1).roll(1, 1)  # what is rejected is not what comes next
        target.verify(state, block)
        target.commit(state, [kept])
        at += kept
        again = target.verify(state, ids[:, at : at + _BLOCK])
        worst = max(worst, _relative(again.logits, target.logits(fresh[:, at : at + _BLOCK])))
    return worst


PROOFS = (
    _Proof(
        "causality",
        _causality,
        "later tokens change the hidden states of earlier ones across a chunk border of the scan",
        "Upgrade transformers (5.15 or newer computes Nemotron-H rightly), or install mamba-ssm and causal-conv1d.",
        half_tolerance=0.01,  # both sides are computed in the same shape
    ),
    _Proof(
        "taps",
        _taps,
        "the tapped hidden states are not what the next layer receives",
        "Report the model type; its layers change the residual stream outside their own output.",
    ),
    _Proof(
        "head",
        _head,
        "the LM head on the last hidden state does not give the model's logits",
        "The final norm, a multiplier or a soft cap is missing; this family needs its own module.",
    ),
    _Proof(
        "padding",
        _padding,
        "right padding changes the hidden states of real tokens",
        "Upgrade transformers, or use --set cache.batch_tokens=1 so that no sequence is padded.",
    ),
    _Proof(
        "rollback",
        _rollback,
        "after a rejected block the state is not the state of a fresh forward",
        "Speculative decoding would change the output; do not serve. Report the model type and the versions in use.",
    ),
)


def run_proofs(target: Target, taps: Sequence[int] = ()) -> list[ProofResult]:
    """Run every proof on ``target`` with ``taps``; never raises for a failed one."""
    generator = torch.Generator().manual_seed(0)
    length = 3 * _chunk(target) + 2 * _BLOCK + 24
    ids = torch.randint(0, target.spec.vocab_size, (1, length), generator=generator).to(target.device)
    results = []
    for proof in PROOFS:
        began = time.perf_counter()
        error = proof.measure(target, ids, taps)
        tolerance = 1e-4 if target.dtype == torch.float32 else proof.half_tolerance
        results.append(
            ProofResult(
                proof.name, error <= tolerance, error, tolerance, time.perf_counter() - began, proof.cause, proof.cure
            )
        )
    return results


def prove(target: Target, taps: Sequence[int] = ()) -> list[ProofResult]:
    """Run every proof; `CheckError` with cause and cure at the first that fails."""
    results = run_proofs(target, taps)
    for result in results:
        if not result.passed:
            raise CheckError(
                f"{target.spec.name} fails the {result.name} proof (error {result.error:.2g}, allowed "
                f"{result.tolerance:g}): {result.cause}.",
                result.cure,
            )
    return results
