"""Cross-entropy and L1 of many slots, with their gradients, in one pass that never holds slots x vocabulary.

Slots are taken a chunk at a time: logits of draft and target, the two losses, and straight away the gradient with
respect to the logits, which is multiplied back into hidden states and weights before the chunk is dropped. With
p the draft's distribution, q the target's, s = sign(p - q) and y the label's one-hot:

    d CE / d logits = p - y          d L1 / d logits = p ⊙ (s - Σ_v s_v p_v)

Slots that predict the same position share the target's logits, which are computed once per position.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23  # logits held at a time, slots x vocabulary


def slot_losses(
    hidden: Tensor,  # [N, H]
    latents: Tensor | None,  # [N, r] of the sequential head
    head: Tensor,  # [V, H] the LM head, frozen
    markov: Tensor | None,  # [V, r] the sequential head's output weight
    labels: Tensor,  # [N]
    weights: tuple[Tensor, Tensor],  # [N] each: what CE and L1 of a slot count in the sum
    last: Tensor | None,  # [P, H] the target's hidden states of the positions that slots predict from
    position: Tensor,  # [N] row of ``last`` each slot belongs to, ascending
    target_logits: Callable[[Tensor], Tensor],  # [p, H] to [p, V]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ w_ce·CE + w_l1·L1, differentiable in ``hidden``, ``latents`` and ``markov``; CE [N] and L1 [N], which are not.

    L1 is None without ``last``. Sums and softmaxes are at least fp32; matrix products are in the type of the weights.
    """
    wanted = torch.is_grad_enabled()
    total, ce, l1 = _SlotLosses.apply(
        hidden, latents, markov, head, labels, *weights, last, position, target_logits, wanted
    )
    return total, ce, l1 if last is not None else None


class _SlotLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, latents, markov, head, labels, w_ce, w_l1, last, position, target_logits, wanted):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ce = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        l1 = torch.zeros_like(ce)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_latents = torch.empty_like(latents) if wanted and latents is not None else None
        grad_markov = torch.zeros_like(markov, dtype=wide) if wanted and markov is not None else None
        for rows in _chunks(position, max(1, CHUNK_ELEMENTS // len(head))):
            logits = hidden[rows] @ head.T
            if markov is not None:
                logits = torch.addmm(logits, latents[rows], markov.T, out=logits)
            p = logits.to(wide)
            chosen = p.gather(1, labels[rows, None])[:, 0]
            norm = p.amax(-1)
            p.sub_(norm[:, None]).exp_()
            mass = p.sum(-1)
            ce[rows] = norm + mass.log() - chosen
            p.div_(mass[:, None])
            gradient = None
            if last is not None:
                first, end = int(position[rows.start]), int(position[rows.stop - 1]) + 1
                q = torch.softmax(target_logits(last[first:end]).to(wide), dim=-1)
                difference = p - q[position[rows] - first]
                del q
                l1[rows] = torch.linalg.vector_norm(difference, ord=1, dim=-1)
                if wanted:
                    gradient = difference.sign_()
                    inner = torch.linalg.vecdot(gradient, p)
                    scale = w_l1[rows, None]
                    gradient.sub_(inner[:, None]).mul_(scale).add_(w_ce[rows, None]).mul_(p)
            elif wanted:
                gradient = p.mul_(w_ce[rows, None])
            if not wanted:
                continue
            gradient.scatter_add_(1, labels[rows, None], -w_ce[rows, None])
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, head, out=grad_hidden[rows])
            if markov is not None:
                torch.mm(gradient, markov, out=grad_latents[rows])
                if grad_markov.dtype == gradient.dtype:
                    grad_markov.addmm_(gradient.T, latents[rows])
                else:
                    grad_markov += gradient.T @ latents[rows]
        if wanted:
            ctx.gradients = (grad_hidden, grad_latents, grad_markov.to(markov.dtype) if markov is not None else None)
        ctx.mark_non_differentiable(ce, l1)
        return (w_ce * ce).sum() + (w_l1 * l1).sum(), ce, l1

    @staticmethod
    def backward(ctx, grad_total, _grad_ce, _grad_l1):
        scaled = [None if gradient is None else gradient.mul_(grad_total) for gradient in ctx.gradients]
        del ctx.gradients
        return (*scaled, *[None] * 8)


def _chunks(position: Tensor, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` slots; one ends where a position ends, unless a position alone has more slots."""
    ends = position.new_ones(len(position), dtype=torch.bool)
    ends[:-1] = position[1:] != position[:-1]
    borders = (ends.nonzero()[:, 0] + 1).tolist()
    start = previous = 0
    for border in borders:
        if border - start > size and previous > start:
            yield slice(start, previous)
            start = previous
        while border - start > size:
            yield slice(start, start + size)
            start += size
        previous = border
    if previous > start:
        yield slice(start, previous)
