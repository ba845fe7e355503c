"""Losses of many slots over a large vocabulary, with their gradients, without ever holding slots x vocabulary.

A chunk of slots at a time: logits of draft and target in one matrix product, the losses and their gradient with respect
to the logits (`Formula`, which the objective brings), and straight away the products of that gradient with the weights
and the hidden states, before the chunk is dropped. So the backward only scales what the forward has made. (As Liger
Kernel's fused linear cross-entropy, arXiv:2410.10989, but for losses against a second distribution.)

Slots that predict the same position share the target's logits, which are computed once a chunk. Of a draft that can
draft only a part of the vocabulary they are reduced there to probabilities of that part, not normalised again: what
the target gives to other tokens can never be accepted. How the work is cut (`Tiling`) decides the speed and, beyond the
order of summation, nothing else.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nemotron_dspark.training.anchors import LossSlots
from nemotron_dspark.training.tiling import Tiling

# (logits of the draft [n, N], `TargetProbabilities` or None, labels [n], a weight [n] per term) to (a term [n] for
# each, the gradient [n, N] of Σ weight·term by the draft's logits). Logits are at least fp32, and not to be changed;
# the target's probabilities may be.
Formula = Callable[..., tuple[Sequence[Tensor], Tensor]]


@dataclasses.dataclass(frozen=True)
class Heads:
    """The LM heads of draft and target, frozen."""

    draft: Tensor  # [N, H]
    target: Tensor  # [V, H]; the same one where the draft can draft every token
    vocabulary: Tensor | None = None  # int64 [N] which rows of the target's the draft's are; None: all


@dataclasses.dataclass(frozen=True)
class TargetProbabilities:
    """What the target gives to the tokens that the draft can draft; of other tokens only in reduced vocabularies."""

    each: Tensor  # [n, N]
    outside: Tensor | None = None  # [n] to all other tokens together
    has_likeliest: Tensor | None = None  # bool [n] whether its likeliest token is one that the draft can draft

    def at(self, rows: Tensor) -> "TargetProbabilities":
        """A copy of ``rows`` [m]."""
        rest = (None if part is None else part[rows] for part in (self.outside, self.has_likeliest))
        return TargetProbabilities(self.each[rows], *rest)

    def agrees(self, logits: Tensor) -> Tensor:
        """Where the likeliest token of the draft's ``logits`` [n, N] is the target's: [n], 1 or 0."""
        same = logits.argmax(-1) == self.each.argmax(-1)
        return (same if self.has_likeliest is None else same & self.has_likeliest).to(self.each.dtype)


def chunked_losses(
    formula: Formula,
    hidden: Tensor,  # [N, H] of the draft, a row per slot
    latents: Tensor | None,  # [N, r] of the sequential head
    heads: Heads,
    markov: Tensor | None,  # [N, r] the sequential head's output weight
    labels: Tensor,  # [N] among the tokens that the draft can draft
    weights: Sequence[Tensor],  # [N] for each term; zeros for one that is only reported
    last: Tensor | None,  # [P, H] the target's hidden states of the positions that slots predict from
    slots: LossSlots,
    finish: Callable[[Tensor], Tensor],  # what the target does to the output of its head before the softmax
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """Σ of weight·term over slots and terms, differentiable in the first three tensors; the terms [T, N].

    Matrix products are in the type of the heads, all else is at least fp32.
    """
    wanted = torch.is_grad_enabled()
    arguments = (formula, heads, labels, tuple(weights), last, slots, finish, tiling, wanted)
    return _ChunkedLosses.apply(hidden, latents, markov, *arguments)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, latents, markov, formula, heads, labels, weights, last, slots, finish, tiling, wanted):
        head, vocabulary, whole = heads.draft, len(heads.draft), heads.vocabulary is None
        tiles = tiling.tiles if whole else math.gcd(tiling.tiles, vocabulary)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        terms = torch.zeros(len(weights), len(labels), dtype=wide, device=hidden.device)
        gradients = [
            None if given is None or not wanted else torch.zeros_like(given, dtype=wide)
            for given in (hidden, latents, markov)
        ]
        grad_hidden, grad_latents, grad_markov = gradients
        # Tiles of the vocabulary are the batch of every product; a tile's logits lie together in memory.
        tiled_head = head.unflatten(0, (tiles, -1))
        tiled_markov = None if markov is None else markov.to(head.dtype).unflatten(0, (tiles, -1))
        chunks = list(_chunks(slots.host_position, tiling.chunk, with_targets=last is not None))
        most = max((_length(own) + whole * _length(places) for own, places in chunks), default=0)
        buffer = head.new_empty(most * vocabulary)  # one for all chunks: fresh memory is paid for page by page
        for own, places in chunks:
            count, rows = _length(own), _length(own) + whole * _length(places)
            logits = buffer[: rows * vocabulary].view(tiles, rows, -1)  # the draft's rows, then the target's
            of_draft, of_target = logits[:, :count], logits[:, count:]
            # One product for both: BLAS leaves threads and matrix units idle where there are few rows.
            states = torch.cat((hidden[own], last[places])) if whole and last is not None else hidden[own]
            torch.bmm(states.expand(tiles, -1, -1), tiled_head.mT, out=logits)
            if tiled_markov is not None:
                of_draft.baddbmm_(latents[own].expand(tiles, -1, -1), tiled_markov.mT)
            known = None if whole or last is None else _reduced(last[places], heads, finish, wide, tiling)
            # The formula reads a row a dozen times, so on a CPU it gets few enough to stay in the processor's cache.
            for part in _slices(count, tiling.group):
                at = slice(own.start + part.start, own.start + part.stop)
                target = None
                if last is not None:
                    rows_at = slots.position[at] - places.start
                    if known is not None:
                        target = known.at(rows_at)
                    else:
                        target = TargetProbabilities(softmax(finish(_by_row(of_target[:, rows_at], wide)))[0])
                found, gradient = formula(
                    _by_row(of_draft[:, part], wide), target, labels[at], *(weight[at] for weight in weights)
                )
                torch.stack(tuple(found), out=terms[:, at])
                of_draft[:, part] = gradient.unflatten(1, (tiles, -1)).transpose(0, 1)
            if grad_hidden is not None:
                torch.sum(of_draft @ tiled_head, 0, dtype=wide, out=grad_hidden[own])
            if tiled_markov is not None and grad_latents is not None and grad_markov is not None:
                torch.sum(of_draft @ tiled_markov, 0, dtype=wide, out=grad_latents[own])
                _add_product(grad_markov.unflatten(0, (tiles, -1)), of_draft.mT, latents[own])
        ctx.gradients = [
            None if gradient is None else gradient.to(given.dtype)
            for gradient, given in zip(gradients, (hidden, latents, markov), strict=True)
        ]
        ctx.mark_non_differentiable(terms)
        return sum((weight * term).sum() for weight, term in zip(weights, terms, strict=True)), terms

    @staticmethod
    def backward(ctx, *grad_outputs):
        scaled = [None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in ctx.gradients]
        del ctx.gradients
        return (*scaled, *[None] * 9)


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows [n, V], and the logarithm of what was divided by [n, 1]."""
    # Plain passes over what lies in the cache: as fast as torch.softmax, which does not give the logarithm.
    largest = logits.amax(-1, keepdim=True)
    exponentials = (logits - largest).exp_()
    mass = exponentials.sum(-1, keepdim=True)
    return exponentials.div_(mass), largest + mass.log()


def _reduced(
    states: Tensor,  # [n, H] the target's
    heads: Heads,
    finish: Callable[[Tensor], Tensor],
    wide: torch.dtype,
    tiling: Tiling,
) -> TargetProbabilities:
    """The target's probabilities of a part of its vocabulary, from its logits of all of it."""
    tiles = heads.target.unflatten(0, (tiling.tiles, -1))
    logits = states.expand(tiling.tiles, -1, -1) @ tiles.mT  # [tiles, n, words]
    parts = []
    for rows in _slices(len(states), tiling.group):
        every = finish(_by_row(logits[:, rows], wide))
        mass, largest = every.logsumexp(-1, keepdim=True), every.amax(-1)
        kept = every[:, heads.vocabulary]
        has_likeliest = kept.amax(-1) == largest
        each = kept.sub_(mass).exp_()
        parts.append((each, (1 - each.sum(-1)).clamp_(min=0), has_likeliest))
    return TargetProbabilities(*(torch.cat(some) for some in zip(*parts, strict=True)))


def _by_row(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[tiles, n, words] to [n, V] in ``dtype``."""
    return logits.transpose(0, 1).flatten(1).to(dtype)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left`` [tiles, m, k] times ``right`` [k, n] to ``to`` [tiles, m, n], in the type of ``to``."""
    right = right.expand(len(to), -1, -1)
    if left.dtype == to.dtype:
        to.baddbmm_(left, right)
    else:
        to += left @ right


def _chunks(places: Sequence[int], most: int, *, with_targets: bool) -> Iterator[tuple[slice, slice]]:
    """Runs of slots of about the same work, with the positions they predict from: both together at most ``most``.

    (Two where ``most`` is less.) No positions without targets.
    """
    work = [slot + place for slot, place in enumerate(places)] if with_targets else range(len(places))
    shares = _slices(work[-1] + 1 if work else 0, max(1, most - 1) if with_targets else max(1, most))
    for share in shares:
        first, beyond = bisect.bisect_left(work, share.start), bisect.bisect_left(work, share.stop)
        if first < beyond:
            yield slice(first, beyond), slice(places[first], places[beyond - 1] + 1) if with_targets else slice(0, 0)


def _slices(total: int, size: int) -> Iterator[slice]:
    """As few slices of ``range(total)`` as ``size`` allows, all of about the same length."""
    count = -(-total // size)
    return (slice(total * i // count, total * (i + 1) // count) for i in range(count))


def _length(part: slice) -> int:
    return part.stop - part.start
