"""Proofs that a loaded target computes what every later stage relies on. Seconds now instead of a lost week later.

Each proof compares two ways to the same number on random tokens and knows what it means when they differ. None trusts
a version number: kernels, patches and remote code all change what a version computes.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nemotron_dspark.errors import CheckError, NdsError, first_line
from nemotron_dspark.targets.taps import default_taps
from nemotron_dspark.targets.target import Sequences, Target, layer_input

_BLOCK = 8
_REACH = {"cpu": 1024}  # the widest sliding window that `verify` goes beyond; wider ones would take minutes on a CPU
_REACH_ELSEWHERE = 8192


@dataclasses.dataclass(frozen=True)
class ProofResult:
    name: str
    passed: bool
    error: float  # relative error of the worst position (fp32) or of a typical one (half precision)
    tolerance: float
    seconds: float
    cause: str  # what it means when it fails
    cure: str
    note: str = ""  # what a proof that passed did not reach


_Measure: TypeAlias = Callable[[Target, Sequence[int]], float]


@dataclasses.dataclass(frozen=True)
class _Proof:
    name: str
    measure: _Measure
    cause: str
    cure: str
    half_tolerance: float  # blocks and sequences round differently; smaller faults show only in fp32
    decodes: bool  # it needs a target that decodes, or the model's own logits


PROOFS: list[_Proof] = []  # a fault may fail proofs behind the one that names it: the first failure is the one to read


def _proves(
    cause: str, cure: str, half_tolerance: float = 0.1, *, decodes: bool = False
) -> Callable[[_Measure], _Measure]:
    """Add the decorated function to `PROOFS`: it is called ``_name`` and returns an error."""

    def add(measure: _Measure) -> _Measure:
        PROOFS.append(_Proof(measure.__name__.removeprefix("_"), measure, cause, cure, half_tolerance, decodes))
        return measure

    return add


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


def _window(target: Target) -> int:
    """How far sliding attention sees; 0 when there is none."""
    return int(getattr(target.model.config.get_text_config(), "sliding_window", None) or 0)


def _random_ids(target: Target, length: int) -> Tensor:
    """The same random tokens [1, length] for every proof."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, target.spec.vocab_size, (1, length), generator=generator).to(target.device)


def _across_borders(target: Target) -> Tensor:
    return _random_ids(target, 3 * _chunk(target) + 2 * _BLOCK + 24)


@_proves(
    "hidden states or logits are infinite or not numbers",
    "The weights are damaged, or too large for this dtype: download them again, or use bfloat16 or float32.",
)
def _finite(target: Target, taps: Sequence[int]) -> float:
    captured = target.capture(_across_borders(target), None, taps)
    parts = (captured.taps, captured.last, target.logits(captured.last[:, -_BLOCK:]))
    return 0.0 if all(bool(torch.isfinite(part).all()) for part in parts) else float("inf")


@_proves(
    "hidden states depend on later tokens, across a chunk border of the scan, or not even on earlier ones",
    "Upgrade transformers (5.15 or newer computes Nemotron-H rightly), or install mamba-ssm and causal-conv1d.",
    half_tolerance=0.01,  # both sides are computed in the same shape
)
def _causality(target: Target, taps: Sequence[int]) -> float:
    """Change the tokens behind a prefix, but for the last few: its outputs must stay, those of the last few must not.

    Mixers that pass nothing on would make every other proof an empty one.
    """
    ids = _across_borders(target)
    kept = 2 * _chunk(target) + 4  # the prefix crosses borders itself, and one lies behind it
    changed = ids.clone()
    changed[:, kept:-_BLOCK] = (changed[:, kept:-_BLOCK] + 1) % target.spec.vocab_size
    whole, other = (each.last for each in target.captures([Sequences(ids), Sequences(changed)], ()))
    if _relative(other[:, -_BLOCK:], whole[:, -_BLOCK:]) < 1e-3:
        return float("inf")
    return _relative(other[:, :kept], whole[:, :kept], quantile=0.9)  # a leak may reach back one chunk only


@_proves(
    "the tapped hidden states are not what the next layer receives",
    "Report the model type; its layers change the residual stream outside their own output.",
    half_tolerance=0.005,  # computed twice in the same shape; neighbours in a deep target differ by a few percent
)
def _taps(target: Target, taps: Sequence[int]) -> float:
    """Taps against the residual stream rebuilt from outside: what enters the next layer is what left the tapped one."""
    ids = _across_borders(target)
    captured = target.capture(ids, None, taps).taps.chunk(len(taps), dim=-1)
    layers = target.model.get_submodule(target.spec.names.layers)
    entering: dict[int, Tensor] = {}

    def keep(_module, args, kwargs, *, tap):
        entering[tap] = layer_input(args, kwargs)

    with contextlib.ExitStack() as hooks:
        for tap in taps:
            hook = functools.partial(keep, tap=tap)
            hooks.enter_context(layers[tap + 1].register_forward_pre_hook(hook, with_kwargs=True))
        target.capture(ids, None, ())
    return max(_relative(tapped, entering[tap]) for tap, tapped in zip(taps, captured, strict=True))


@_proves(
    "the LM head on the last hidden state does not give the model's logits",
    "The final norm, a multiplier or a soft cap is missing; this family needs its own module.",
    half_tolerance=0.01,  # the model rounds after its multiplier and soft cap
    decodes=True,
)
def _head(target: Target, taps: Sequence[int]) -> float:
    ids = _across_borders(target)
    with torch.no_grad():
        logits = target.model(input_ids=ids, use_cache=False).logits
    return _relative(target.logits(target.capture(ids, None, ()).last), logits)


@_proves(
    "right padding changes the hidden states of real tokens",
    "Upgrade transformers, or use --set cache.batch_tokens=1 so that no sequence is padded.",
)
def _padding(target: Target, taps: Sequence[int]) -> float:
    ids = _across_borders(target)
    kept = _chunk(target) + 3
    padded = torch.stack([ids[0], ids[0]])
    padded[1, kept:] = 0
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[1, kept:] = False
    batches = [Sequences(ids[:, :kept]), Sequences(padded, mask), Sequences(ids)]
    alone, both, whole = (each.last for each in target.captures(batches, taps))
    return max(_relative(both[1:, :kept], alone), _relative(both[:1], whole))


def _prompt(target: Target) -> int:
    """Tokens before the first verified block: beyond a chunk, and beyond the window if that is within reach."""
    window = _window(target)
    return max(_chunk(target), window if window <= _REACH.get(target.device.type, _REACH_ELSEWHERE) else 0) + 5


@_proves(
    "a block behind a state does not give what one forward of the whole sequence gives",
    "Speculative decoding would change the output; do not serve. Sliding windows, positions, limits of the step "
    "size or the model's own cache differ between the two; report the model type and the versions in use.",
    decodes=True,
)
def _verify(target: Target, taps: Sequence[int]) -> float:
    """Two blocks, one after the other, all of their tokens kept, against one forward of the whole sequence."""
    prompt = _prompt(target)
    ids = _random_ids(target, prompt + 2 * _BLOCK)
    whole = target.capture(ids, None, taps)
    state, _ = target.prefill(ids[0, :prompt].tolist(), taps)
    worst = 0.0
    for at in (prompt, prompt + _BLOCK):
        block = slice(at, at + _BLOCK)
        seen = target.verify(state, ids[:, block])
        target.commit(state, [_BLOCK])
        expected = target.logits(whole.last[:, block]).to(whole.last.dtype)
        worst = max(
            worst,
            _relative(seen.logits.to(whole.last.dtype), expected),
            _relative(seen.taps, whole.taps[:, block]),
        )
    return worst


@_proves(
    "after a rejected block the state is not that of a target which has never seen the rejected tokens",
    "Speculative decoding would change the output; do not serve. Report the model type and the versions in use.",
    decodes=True,
)
def _rollback(target: Target, taps: Sequence[int]) -> float:
    """A state that has rejected tokens, against one that has never seen them; whether blocks are right is not asked.

    The two must differ by far less than either does from a state that has kept the rejected tokens.
    """
    ids = _random_ids(target, 24 + 3 * _BLOCK)

    def next_logits(state: Any, at: int) -> Tensor:
        return target.verify(state, ids[:, at : at + _BLOCK]).logits.to(target.dtype)

    at = 24
    state, _ = target.prefill(ids[0, :at].tolist(), taps)
    worst, kept_all = 0.0, float("inf")
    for kept in (0, 3, 1, _BLOCK):
        block = ids[:, at : at + _BLOCK].clone()
        block[:, kept:] = (block[:, kept:] + 1) % target.spec.vocab_size
        wrong, _ = target.prefill([*ids[0, :at].tolist(), *block[0].tolist()], taps)
        target.verify(state, block)
        target.commit(state, [kept])
        at += kept
        fresh, _ = target.prefill(ids[0, :at].tolist(), taps)
        expected = next_logits(fresh, at)
        worst = max(worst, _relative(next_logits(state, at), expected))
        if kept < _BLOCK:
            kept_all = min(kept_all, _relative(next_logits(wrong, at), expected))
    return worst if worst < kept_all / 2 else float("inf")


def run_proofs(target: Target, taps: Sequence[int] = ()) -> list[ProofResult]:
    """Run every proof on ``target`` with ``taps`` (none: the default ones); never raises for a failed one.

    A streamed target, which does not decode, is proven in what it is used for: its hidden states.
    """
    taps = tuple(taps) or default_taps(target.spec)
    results = []
    for proof in (proof for proof in PROOFS if target.decodes or not proof.decodes):
        began, cause = time.perf_counter(), proof.cause
        try:
            error = proof.measure(target, taps)
        except (NdsError, torch.OutOfMemoryError):
            raise
        except Exception as fault:  # whatever a model raises that cannot do what is asked of it
            error, cause = float("inf"), f"the model stops with {type(fault).__name__}, {first_line(fault)}"
        tolerance = 1e-4 if target.dtype == torch.float32 else proof.half_tolerance
        seconds = time.perf_counter() - began
        prompt, window = _prompt(target), _window(target)
        unreached = proof.name == "verify" and prompt <= window
        note = f"{prompt} tokens did not reach the sliding window of {window}" if unreached else ""
        results.append(ProofResult(proof.name, error <= tolerance, error, tolerance, seconds, cause, proof.cure, note))
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
