"""DeepSpec's objective for EAGLE-3: cross-entropy to the target's distribution at every unrolled step.

At step s, position i counts when token i+s carries loss and is not the last one; its target q is the distribution at
i+1+s. With B·S positions in the batch, padding included,

    loss = Σ_s decay^s · Σ_i -Σ_v q_v · log p_v / (B·S)
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_dspark.drafts.eagle3 import Eagle3Draft


@dataclasses.dataclass(frozen=True)
class Eagle3Loss:
    """The loss of one forward and what it is made of. All but ``value`` is detached."""

    value: Tensor  # scalar, to be differentiated
    steps: Tensor  # [steps] each step's part, before its weight
    counted: Tensor  # [steps] positions that count
    correct: Tensor  # [steps] of them those whose likeliest token is the target's
    accepted: Tensor  # [steps] sum of their acceptance rates 1 - TV
    tau: Tensor  # sum over the first step's positions of 1 + Σ_s Π_{j≤s} acceptance_j
    tau_greedy: Tensor  # the same with agreement in place of acceptance


def eagle3_loss(
    draft: Eagle3Draft,
    input_ids: Tensor,  # [B, S], right padded
    loss_mask: Tensor,  # [B, S] bool, False on padding
    lengths: Tensor,  # [B] tokens without padding
    taps: Tensor,  # [B, S, T·H]
    last: Tensor,  # [B, S, H]
) -> Eagle3Loss:
    """Loss of one forward. Positions that do not count are left out before the vocabulary is touched."""
    rows, length = input_ids.shape
    at = torch.arange(length, device=input_ids.device)
    starts = loss_mask & (at < lengths[:, None] - 1)  # [B, S]
    rates = last.new_zeros(draft.config.ttt_length, rows, length, dtype=torch.float32)
    agreed = torch.zeros_like(rates)
    steps, counts = [], []
    for step, hidden in enumerate(draft(input_ids, taps)):
        counted = functional.pad(starts[:, step:], (0, min(step, length)))
        row, position = counted.nonzero(as_tuple=True)  # [N] each
        log_probs = torch.log_softmax(draft.logits(hidden[row, position]).float(), dim=-1)
        with torch.no_grad():
            logits = draft.target_logits(last[row, position + 1 + step].to(draft.compute_dtype))
            target = torch.softmax(logits.float(), dim=-1)
        steps.append(-(target * log_probs).sum() / (rows * length))
        with torch.no_grad():
            distance = (log_probs.exp() - target).abs().sum(-1)
            rates[step, row, position] = (1 - distance / 2).clamp(0, 1)
            agreed[step, row, position] = (log_probs.argmax(-1) == target.argmax(-1)).float()
        counts.append(counted.sum())
    decay = draft.config.step_loss_decay
    parts = torch.stack(steps)
    weights = torch.tensor([decay**step for step in range(len(steps))], device=parts.device)
    return Eagle3Loss(
        (weights * parts).sum(),
        parts.detach(),
        torch.stack(counts),
        agreed.sum(dim=(1, 2)),
        rates.sum(dim=(1, 2)),
        _rounds(rates, starts),
        _rounds(agreed, starts),
    )


def _rounds(kept: Tensor, starts: Tensor) -> Tensor:
    """Σ over ``starts`` [B, S] of 1 + Σ_s Π_{j≤s} kept_j, with ``kept`` [steps, B, S]."""
    return ((1 + kept.cumprod(dim=0).sum(dim=0)) * starts).sum()
