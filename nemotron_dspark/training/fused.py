"""Cross-entropy and L1 of many slots, with their gradients, in one pass that never holds slots x vocabulary.

Slots are taken a chunk at a time: logits of draft and target, the two losses, and straight away the gradient with
respect to the logits, which is multiplied back into hidden states and weights before the chunk is dropped. With
p the draft's distribution, q the target's, s = sign(p - q) and y the label's one-hot:

    d CE / d logits = p - y          d L1 / d logits = p ⊙ (s - Σ_v s_v p_v)

Slots that predict the same position share the target's logits, which are computed once per position of a chunk; fewer
at a time than the draft's, since no gradient goes back through them.

Two sizes decide the speed. A chunk is large, because every chunk reads the weights from memory several times over.
What lies between its matrix products touches each logit a dozen times, so on a CPU it goes through the chunk in groups
of a few rows that stay in the processor's cache; products that read or write the same logits go through it together, a
tile of the vocabulary at a time. All of it works in place on buffers that the chunks share.
"""

import bisect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 4 << 21  # logits of the draft held at a time, slots x vocabulary
TARGET_ELEMENTS = 3 << 21  # and of the target, positions x vocabulary
GROUP_ELEMENTS = 1 << 17  # of them worked on at a time by one thread of a CPU
TILE = 1 << 13  # words of the vocabulary multiplied at a time on a CPU


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
        chunks = list(_slices(len(labels), max(1, CHUNK_ELEMENTS // len(head))))
        places = position.tolist()
        draft_buffer = head.new_empty(_longest(chunks), len(head), dtype=wide)
        most = min(max(1, TARGET_ELEMENTS // len(head)), len(draft_buffer)) if last is not None else 0
        target_buffer = head.new_empty(most, len(head), dtype=wide)
        group = _group_rows(head, len(draft_buffer))
        difference, size = (draft_buffer.new_empty(group if last is not None else 0, len(head)) for _ in range(2))
        tiles = list(_slices(len(head), TILE if head.device.type == "cpu" else len(head)))
        for rows in chunks:
            p = draft_buffer[: rows.stop - rows.start]
            for tile in tiles:
                _product(p[:, tile], hidden[rows], head[tile].T)
                if markov is not None:
                    _add_product(p[:, tile], latents[rows], markov[tile].T)
            for start, end, first, beyond in _shared_targets(places, rows, most):
                if last is not None:
                    q = target_buffer[: beyond - first]
                    _product(q, last[first:beyond], head.T)
                    for part in _slices(len(q), group):
                        _softmax_(_finish_(q[part], finish))
                for part in _slices(end - start, group):
                    at = slice(start + part.start, start + part.stop)
                    p_part = p[at.start - rows.start : at.stop - rows.start]
                    label, scale = labels[at, None], w_ce[at, None]
                    chosen = p_part.gather(1, label)
                    ce[at] = (_softmax_(p_part) - chosen)[:, 0]
                    if last is not None:
                        d, absolute = difference[: len(p_part)], size[: len(p_part)]
                        torch.index_select(q, 0, position[at] - first, out=d)
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
            for tile in tiles:
                gradient = p[:, tile].to(hidden.dtype)
                _add_product(grad_hidden[rows], gradient, head[tile])
                if markov is not None:
                    _add_product(grad_latents[rows], gradient, markov[tile])
                    _add_product(grad_markov[tile], gradient.T, latents[rows])
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


def _shared_targets(places: list[int], rows: slice, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts ``rows`` so that at most ``most`` positions are needed at a time (0: none is, no cut).

    Yields first slot, slot behind the last, first position, position behind the last.
    """
    first, beyond = places[rows.start], places[rows.stop - 1] + 1
    start = rows.start
    for part in _slices(beyond - first, most or beyond - first):
        end = bisect.bisect_left(places, first + part.stop, start, rows.stop)
        yield start, end, first + part.start, first + part.stop
        start = end


def _product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == to.dtype:
        torch.mm(left, right, out=to)
    else:
        to.copy_(left @ right)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == to.dtype:
        to.addmm_(left, right)
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


def _group_rows(weight: Tensor, most: int) -> int:
    if weight.device.type != "cpu":  # a kernel's launch costs more than its way to memory
        return max(1, most)
    return max(1, min(most, GROUP_ELEMENTS // len(weight) * torch.get_num_threads()))


def _slices(total: int, size: int) -> Iterator[slice]:
    """As few slices of ``range(total)`` as ``size`` allows, all of about the same length."""
    count = -(-total // size)
    return (slice(total * i // count, total * (i + 1) // count) for i in range(count))


def _longest(slices: list[slice]) -> int:
    return max((one.stop - one.start for one in slices), default=0)
