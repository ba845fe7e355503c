"""EAGLE-3's objective (arXiv:2503.01840) as DeepSpec has it: cross-entropy to the target at every unrolled step.

At step s, position i counts when token i+s carries loss and is not the last one (`anchors.unrolled_slots`); its target
q is the distribution at i+1+s. In a sequence of S positions, padding included where samples are padded,

    loss = Σ_s decay^s · Σ_i -Σ_v q_v · log p_v / S

and the loss of a step is the mean over its sequences. In a `Batch` position i is the anchor i+1, its unrolled steps are
the slots of that block.

For a draft of a part of the vocabulary the sum over v is over that part, with q as it is: a slot counts by what the
target gives to tokens that can be drafted.
"""

import torch
from torch import Tensor

from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.batches import Batch
from nemotron_dspark.training.fused import Heads, TargetProbabilities, chunked_losses, softmax
from nemotron_dspark.training.metrics import StepSums
from nemotron_dspark.training.objective import Loss, Objective
from nemotron_dspark.training.tiling import Tiling, choose_tiling


class Eagle3Objective(Objective[Eagle3Draft]):
    """The objective of an EAGLE-3 draft."""

    unrolled, num_anchors = True, 0
    needs_target, measured = True, frozenset({"acceptance"})

    def __init__(self, draft: Eagle3Draft, tiling: Tiling | None = None):
        super().__init__()
        self.draft = draft
        self.tiling = tiling or choose_tiling(draft.target_head)

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch, whose blocks are all positions (`collate_unrolled`).

        ``details``: ``correct`` [steps], slots whose likeliest token is the target's; ``tau_greedy``, as ``sums.tau``
        with that in place of acceptance; ``steps`` [steps], what each step adds to the loss before its decay.
        """
        draft, slots, shape = self.draft, batch.slots, batch.slot_mask.shape  # [B, A, steps]
        if batch.last is None:
            raise InputError("The cache holds no last hidden states.", "EAGLE-3 learns from them: build it again.")
        hidden = torch.stack(draft(batch.input_ids, batch.taps, batch.lengths), dim=2)[:, : shape[1]]
        samples, length = _samples(batch)
        # Slots without loss never meet the vocabulary.
        hidden_n = draft.norm(hidden.flatten(0, 2)[slots.index])
        step = slots.index % shape[2]
        weight = draft.config.step_loss_decay ** step.to(torch.promote_types(hidden.dtype, torch.float32))
        weight = weight / length.expand(shape).flatten()[slots.index]
        reported = torch.zeros_like(weight)
        total, terms = chunked_losses(
            eagle3_formula,
            hidden_n,
            None,
            Heads(draft.lm_head.weight, draft.target_head, draft.vocabulary),
            None,
            step,  # no label is looked at
            (weight, reported, reported),
            batch.last.flatten(0, 1)[slots.positions].to(hidden.dtype),
            slots,
            draft.finish_target_logits,
            self.tiling,
        )
        ce, rates, agreed = (
            term.new_zeros(shape).view(-1).index_copy_(0, slots.index, term).view(shape) for term in terms
        )
        # Accepted length as decoding would count it: a step counts where all before it were kept.
        reached = batch.slot_mask[..., 0]
        tau, tau_greedy = (((1 + kept.cumprod(-1).sum(-1)) * reached).sum() for kept in (rates, agreed))
        zero = total.new_zeros(())
        sums = StepSums(
            loss=total.detach(),
            weight=torch.full_like(zero, samples),
            ce=total.detach(),
            l1=zero,
            confidence=zero,
            blocks=reached.sum(),
            tau=tau,
            tokens=torch.full((), batch.tokens, device=hidden.device),
            slots=batch.slot_mask.sum(dim=(0, 1)),
            accepted=rates.sum(dim=(0, 1)),
        )
        steps = (ce / length).sum(dim=(0, 1))
        return Loss(total, sums, {"correct": agreed.sum(dim=(0, 1)), "tau_greedy": tau_greedy, "steps": steps})


def eagle3_formula(
    logits: Tensor,  # [n, N] of the draft
    target: TargetProbabilities,
    labels: Tensor,
    ce_weight: Tensor,  # [n]
    *reported: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Cross-entropy to the target's distribution, acceptance rate and agreement of slots; the gradient of the first.

    With p the softmax of the logits and q the target's probabilities, ∂(-Σ_v q_v log p_v)/∂logits = Σq·p - q.
    """
    p, log_mass = softmax(logits)
    q, log_mass, agreed = target.each, log_mass[:, 0], target.agrees(logits)
    if target.outside is None:
        ce = log_mass - (q * logits).sum(-1)
        difference = p.sub_(q)
        rate = (1 - difference.abs().sum(-1) / 2).clamp(0, 1)
        return [ce, rate, agreed], difference.mul_(ce_weight[:, None])
    inside = q.sum(-1)
    ce = inside * log_mass - (q * logits).sum(-1)
    rate = torch.minimum(p, q).sum(-1)
    return [ce, rate, agreed], p.mul_(inside[:, None]).sub_(q).mul_(ce_weight[:, None])


def _samples(batch: Batch) -> tuple[int, Tensor]:
    """How many samples there are, and how long that of each slot is (it broadcasts to [B, A, steps])."""
    rows, length = batch.input_ids.shape
    if batch.lengths is None:
        return rows, batch.anchors.new_full((1, 1, 1), length)
    each = [batch.anchors.new_full((1, own, 1), own) for own in batch.lengths]
    return len(each), torch.cat(each, dim=1)
