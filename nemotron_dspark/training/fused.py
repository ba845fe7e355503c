"""Cross-entropy and L1 of many slots, with their gradients, in one pass that never holds slots x vocabulary.

Slots are taken a chunk at a time: logits of draft and target, the two losses, and straight away the gradient with
respect to the logits, which is multiplied back into hidden states and weights before the chunk is dropped. With
p the draft's distribution, q the target's, s = sign(p - q) and y the label's one-hot:

    d CE / d logits = p - y          d L1 / d logits = p ⊙ (s - Σ_v s_v p_v)

Slots that predict the same position share the target's logits, which are computed once per position of a chunk, in one
product with those of the draft.

Two sizes decide the speed. A chunk is large, because every chunk reads the weights from memory several times over.
What lies between its matrix products touches each logit a dozen times, so on a CPU it goes through the chunk in groups
of a few rows that stay in the processor's cache. The products are batches over tiles of the vocabulary, which BLAS
shares out among threads better than one product with few rows. All of it works in place on buffers that the chunks
share.
"""

import bisect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 7 << 21  # logits of draft and target held at a time, slots and positions x vocabulary
GROUP_ELEMENTS = 1 << 17  # of them worked on at a time by one thread of a CPU
TILE = 1 << 14  # words of the vocabulary that one product of a batch covers on a CPU, at least


def slot_losses(
    hidden: Tensor,  # [N, H]
    latents: Tensor | None,  # [N, r] of the sequential head
    head: Tensor,  # [V, H] the LM head, frozen
    markov: Tensor | None,  # [V, r] the sequential head's output weight
    labels: Tensor,  # [N]
    weights: tuple[Tensor, Tensor],  # [N] each: what CE and L1 of a slot count in the sum
    last: Tensor | None,  # [P, H] the target's hidden states of the positions that slots predict from
    position: Tensor,  # [N] row of ``last`` each slot belongs to, ascending
    finish: Callable[[Tensor], Tensor],  # what the target does to the output of its head before the softmax
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ w_ce·CE + w_l1·L1, differentiable in ``hidden``, ``latents`` and ``markov``; CE [N] and L1 [N], which are not.

    L1 is None without ``last``. Sums and softmaxes are at least fp32; matrix products are in the type of the weights.
    """
    wanted = torch.is_grad_enabled()
    total, ce, l1 = _SlotLosses.apply(hidden, latents, markov, head, labels, *weights, last, position, finish, wanted)
    return total, ce, l1 if last is not None else None


class _SlotLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, latents, markov, head, labels, w_ce, w_l1, last, position, finish, wanted):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ce = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        l1 = torch.zeros_like(ce)
        grad_hidden, grad_latents, grad_markov = (
            torch.zeros_like(given, dtype=wide) if wanted and given is not None else None
            for given in (hidden, latents, markov)
        )
        chunks = list(_chunks(position.tolist(), CHUNK_ELEMENTS // len(head), with_targets=last is not None))
        most = max((_length(slots) for slots, _ in chunks), default=0)
        both = max((_length(slots) + _length(places) for slots, places in chunks), default=0)
        logits = head.new_empty(both, len(head), dtype=wide)
        group = _group_rows(head, most)
        difference, size = (logits.new_empty(group if last is not None else 0, len(head)) for _ in range(2))
        tiles = _tiles(head)
        tiled_logits = logits.unflatten(1, (tiles, -1)).transpose(0, 1)  # [tiles, rows, words]
        tiled_head, tiled_markov, tiled_grad = (
            None if weight is None else weight.unflatten(0, (tiles, -1)) for weight in (head, markov, grad_markov)
        )
        for slots, places in chunks:
            count, beyond = _length(slots), _length(slots) + _length(places)
            p, q, tiled_p = logits[:count], logits[count:beyond], tiled_logits[:, :count]
            states = hidden[slots] if last is None else torch.cat((hidden[slots], last[places]))
            _product(tiled_logits[:, :beyond], states, tiled_head.mT)
            if markov is not None:
                _add_product(tiled_p, latents[slots], tiled_markov.mT)
            for part in _slices(len(q), group):
                _softmax_(_finish_(q[part], finish))
            for part in _slices(count, group):
                at = slice(slots.start + part.start, slots.start + part.stop)
                p_part = p[part]
                label, scale = labels[at, None], w_ce[at, None]
                chosen = p_part.gather(1, label)
                ce[at] = (_softmax_(p_part) - chosen)[:, 0]
                if last is not None:
                    d, absolute = difference[: len(p_part)], size[: len(p_part)]
                    torch.index_select(q, 0, position[at] - places.start, out=d)
                    torch.sub(p_part, d, out=d)
                    torch.sum(torch.abs(d, out=absolute), -1, out=l1[at])
                    if wanted:
                        d.sign_().mul_(p_part)
                        w = w_l1[at, None]
                        p_part.mul_(scale - w * d.sum(-1, keepdim=True)).addcmul_(d, w)
                elif wanted:
                    p_part.mul_(scale)
                if wanted:
                    p_part.scatter_add_(1, label, -scale)
            if not wanted:
                continue
            gradient = tiled_p.to(hidden.dtype)
            torch.sum(gradient @ tiled_head, 0, dtype=wide, out=grad_hidden[slots])
            if markov is not None:
                torch.sum(gradient @ tiled_markov, 0, dtype=wide, out=grad_latents[slots])
                _add_product(tiled_grad, gradient.mT, latents[slots])
        if wanted:
            ctx.gradients = [
                None if gradient is None else gradient.to(given.dtype)
                for gradient, given in ((grad_hidden, hidden), (grad_latents, latents), (grad_markov, markov))
            ]
        ctx.mark_non_differentiable(ce, l1)
        return (w_ce * ce).sum() + (w_l1 * l1).sum(), ce, l1

    @staticmethod
    def backward(ctx, grad_total, _grad_ce, _grad_l1):
        scaled = [None if gradient is None else gradient.mul_(grad_total) for gradient in ctx.gradients]
        del ctx.gradients
        return (*scaled, *[None] * 8)


def _chunks(places: list[int], most: int, *, with_targets: bool) -> Iterator[tuple[slice, slice]]:
    """Runs of slots of about the same work, with the positions they predict from: both together at most ``most``.

    (Two where ``most`` is less.) No positions without targets.
    """
    work = [slot + place for slot, place in enumerate(places)] if with_targets else range(len(places))
    shares = _slices(work[-1] + 1 if work else 0, max(1, most - 1) if with_targets else max(1, most))
    for share in shares:
        first, beyond = bisect.bisect_left(work, share.start), bisect.bisect_left(work, share.stop)
        if first < beyond:
            yield slice(first, beyond), slice(places[first], places[beyond - 1] + 1) if with_targets else slice(0, 0)


def _product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """``to`` [tiles, m, n] becomes ``left`` [m, k] times each of ``right`` [tiles, k, n]."""
    left = left.expand(len(right), -1, -1)
    if left.dtype == to.dtype:
        torch.bmm(left, right, out=to)
    else:
        to.copy_(left @ right)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left`` times ``right`` to ``to``, [tiles, m, n]; one of the two may be the same for every tile."""
    left, right = (factor.expand(len(to), -1, -1) for factor in (left, right))
    if left.dtype == to.dtype:
        to.baddbmm_(left, right)
    else:
        to += left @ right


def _finish_(logits: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    finished = finish(logits)
    return logits if finished is logits else logits.copy_(finished)


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax in place; returns the log of what was divided by, [n, 1]."""
    # Four plain passes over what lies in the cache: measured faster than torch.softmax, and one row uses all threads.
    largest = logits.amax(-1, keepdim=True)
    mass = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    logits.div_(mass)
    return largest + mass.log()


def _tiles(weight: Tensor) -> int:
    """Into how many equal parts of at least `TILE` words the vocabulary is cut."""
    if weight.device.type != "cpu":
        return 1
    return next((count for count in range(len(weight) // TILE, 1, -1) if len(weight) % count == 0), 1)


def _group_rows(weight: Tensor, most: int) -> int:
    if weight.device.type != "cpu":  # a kernel's launch costs more than its way to memory
        return max(1, most)
    return max(1, min(most, GROUP_ELEMENTS // len(weight) * torch.get_num_threads()))


def _slices(total: int, size: int) -> Iterator[slice]:
    """As few slices of ``range(total)`` as ``size`` allows, all of about the same length."""
    count = -(-total // size)
    return (slice(total * i // count, total * (i + 1) // count) for i in range(count))


def _length(part: slice) -> int:
    return part.stop - part.start
