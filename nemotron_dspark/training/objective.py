"""DeepSpec's objective: cross-entropy to the text, L1 to the target's distribution, and a calibrated confidence.

With w_k = exp(-k/γ_decay) for the slots that count and 0 for all others, every term is Σ w·term / (Σ w + 1e-6) over the
slots of one optimiser step, however it is cut into micro-batches and processes:

    CE   = -log p(token)                 p: the draft's distribution in the slot
    L1   = Σ_v |p_v - q_v|               q: the target's, softmax(logits of its last hidden state); this is 2 x TV
    BCE  of the confidence logit against the acceptance rate 1 - L1/2, which carries no gradient

    loss = α_ce·CE + α_l1·L1 + α_conf·BCE

A draft of a part of the vocabulary has p = 0 for all other tokens. So L1 counts what q gives to them, 1 - L1/2 is still
Σ_v min(p_v, q_v), the rate of acceptance, and a slot whose token is none that it can draft adds no CE.
"""

import dataclasses
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.dspark import Draft, DSparkDraft
from nemotron_dspark.drafts.heads import VanillaHead
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.batches import Batch
from nemotron_dspark.training.fused import Heads, TargetProbabilities, chunked_losses, softmax
from nemotron_dspark.training.metrics import StepSums
from nemotron_dspark.training.tiling import Tiling, choose_tiling

EPSILON = 1e-6

_Draft = TypeVar("_Draft", bound=Draft)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The alphas and the decay of the slots."""

    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0  # 0 also where the draft has no confidence head
    decay: float | None = 4.0  # γ_decay; None: all slots alike

    @staticmethod
    def of(config: TrainConfig, draft: DSparkDraft) -> "LossWeights":
        confidence = config.confidence_alpha if draft.confidence_head is not None else 0.0
        return LossWeights(config.ce_alpha, config.l1_alpha, confidence, config.loss_decay_gamma)

    @property
    def needs_target(self) -> bool:
        """False: the last hidden states are never looked at, and acceptance is not measured."""
        return self.l1 > 0 or self.confidence > 0


class Loss(NamedTuple):  # a tuple, so that FSDP finds the tensor to be differentiated
    """What one micro-batch adds to the loss of its step. All but ``total`` is detached."""

    total: Tensor  # Σ w·(α_ce·CE + α_l1·L1 + α_conf·BCE), to be differentiated
    sums: StepSums
    details: Mapping[str, Tensor] = {}  # what a kind of draft measures beside them

    @property
    def value(self) -> Tensor:
        """The loss where this micro-batch is the whole step."""
        return self.total / (self.sums.weight + EPSILON)


class Objective(nn.Module, Generic[_Draft]):
    """A draft and its loss as one module: in its forward sharded parameters are full, and the loss needs some."""

    draft: _Draft
    needs_target: bool  # the loss reads the target's last hidden states, and so measures acceptance
    measured: frozenset[str]  # of "l1", "confidence" and "acceptance"
    num_anchors: int  # blocks drawn per sample
    unrolled = False  # every position is trained for some steps, and no anchors are drawn

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch."""
        raise NotImplementedError


class DSparkObjective(Objective[DSparkDraft]):
    """The objective of a DSpark draft."""

    def __init__(self, draft: DSparkDraft, weights: LossWeights, tiling: Tiling | None = None):
        super().__init__()
        self.draft = draft
        self.weights = weights
        self.tiling = tiling or choose_tiling(draft.target_head)
        self.needs_target = weights.needs_target
        found = {"confidence": weights.confidence > 0, "l1": self.needs_target, "acceptance": self.needs_target}
        self.measured = frozenset(name for name, yes in found.items() if yes)
        self.num_anchors = draft.config.num_anchors

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch.

        Raises:
            InputError: a term needs the target's last hidden states and ``batch`` has none.
        """
        placed = (batch.anchors, batch.block_mask, batch.positions, batch.far)
        return self.loss(self.draft(batch.input_ids, batch.taps, *placed), batch)

    def loss(self, hidden: Tensor, batch: Batch) -> Loss:
        """`forward` from where the draft's own forward has given ``hidden`` [B, A, γ, H].

        ``details``, without gradients alone: ``correct`` [γ], slots whose likeliest token is the target's.
        """
        draft, weights, slots = self.draft, self.weights, batch.slots
        last = batch.last if weights.needs_target else None
        if weights.needs_target and last is None:
            raise InputError(
                "The cache holds no last hidden states.",
                "Build it again, or train on cross-entropy alone (train.l1_alpha=0 train.confidence_alpha=0).",
            )
        # Slots without loss never meet the vocabulary.
        hidden_n = hidden.flatten(0, 2)[slots.index]  # [N, H]
        embedded = latents = markov = None  # [N, r] each; [V, r]
        if isinstance(draft.markov_head, VanillaHead):
            # W1 is read once for both heads: its gradient is as large as the vocabulary.
            table = draft.markov_head.embed(_previous_tokens(batch), hidden.dtype)  # [B, A, γ, r]
            embedded, latents = (
                each.flatten(0, 2)[slots.index] for each in (table, draft.markov_head.latents(hidden, table))
            )
            markov = draft.markov_head.markov_w2.weight
        weight = torch.ones(
            len(slots.index), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        if weights.decay is not None:
            weight = torch.exp(-(slots.index % hidden.shape[2]).to(weight.dtype) / weights.decay)
        labels, ce_weight = batch.input_ids.flatten()[slots.positions + 1][slots.position], weight
        if (vocabulary := draft.vocabulary) is not None:
            at = torch.searchsorted(vocabulary, labels).clamp_(max=len(vocabulary) - 1)
            labels, ce_weight = at, weight * (vocabulary[at] == labels)
        term_weights = (weights.ce * ce_weight,)
        if last is not None:
            term_weights += (weights.l1 * weight,)
            if not torch.is_grad_enabled():  # a pass more over the logits, which training does not pay for
                term_weights += (torch.zeros_like(weight),)
        total, terms = chunked_losses(
            dspark_formula,
            hidden_n,
            latents,
            Heads(draft.lm_head.weight, draft.target_head, vocabulary),
            markov,
            labels,
            term_weights,
            None if last is None else last.flatten(0, 1)[slots.positions - batch.far].to(hidden.dtype),
            slots,
            draft.finish_target_logits,
            self.tiling,
        )
        l1_sum = confidence_sum = tau = weight.new_zeros(())
        rates = weight.new_zeros(batch.slot_mask.shape)  # of acceptance
        reached = batch.slot_mask[..., 0]
        if last is not None:
            l1_sum = (weight * terms[1]).sum()
            accept = (1 - terms[1] / 2).clamp(0, 1)
            rates.view(-1).index_copy_(0, slots.index, accept)
            tau = ((1 + rates.cumprod(dim=-1).sum(dim=-1)) * reached).sum()
            if weights.confidence and draft.confidence_head is not None:
                seen = embedded if draft.config.confidence_head_with_markov else None
                logit = _wide(draft.confidence_head(hidden_n, seen))
                bce = functional.binary_cross_entropy_with_logits(logit, accept, reduction="none")
                confidence_sum = (weight * bce).sum()
        total = total + weights.confidence * confidence_sum
        sums = StepSums(
            loss=total.detach(),
            weight=weight.sum(),
            ce=(ce_weight * terms[0]).sum(),
            l1=l1_sum,
            confidence=confidence_sum.detach(),
            blocks=reached.sum(),
            tau=tau,
            tokens=torch.full((), batch.tokens, device=hidden.device),
            slots=batch.slot_mask.sum(dim=(0, 1)),
            accepted=rates.sum(dim=(0, 1)),
        )
        details = {}
        if len(terms) == 3:
            correct = torch.zeros_like(rates)
            correct.view(-1).index_copy_(0, slots.index, terms[2])
            details["correct"] = correct.sum(dim=(0, 1))
        return Loss(total, sums, details)


def dspark_formula(
    logits: Tensor,  # [n, N] of the draft
    target: TargetProbabilities | None,
    labels: Tensor,  # [n]
    ce_weight: Tensor,  # [n]
    l1_weight: Tensor | None = None,  # [n]; None without the target's probabilities
    agreement_weight: Tensor | None = None,  # [n] zeros: reported alone; None: not even that
) -> tuple[list[Tensor], Tensor]:
    """CE and, with a target, L1 of slots, if asked agreement; the gradient of the weighted sum by the draft's logits.

    With p the softmax of the logits, q the target's probabilities, y the label's one-hot and s = sign(p - q):

        ∂CE/∂logits = p - y          ∂L1/∂logits = p ⊙ (s - Σ_v s_v p_v)
    """
    labels, ce_weight = labels[:, None], ce_weight[:, None]
    chosen = logits.gather(1, labels)
    p, log_mass = softmax(logits)
    terms = [(log_mass - chosen)[:, 0]]
    if target is None or l1_weight is None:
        return terms, p.mul_(ce_weight).scatter_add_(1, labels, -ce_weight)
    agreed = [] if agreement_weight is None else [target.agrees(logits)]
    difference = torch.sub(p, target.each, out=target.each)
    l1 = difference.abs().sum(-1)
    terms += [l1 if target.outside is None else l1 + target.outside, *agreed]
    signed = difference.sign_().mul_(p)  # s ⊙ p
    l1_weight = l1_weight[:, None]
    gradient = p.mul_(ce_weight - l1_weight * signed.sum(-1, keepdim=True)).addcmul_(signed, l1_weight)
    return terms, gradient.scatter_add_(1, labels, -ce_weight)


def _previous_tokens(batch: Batch) -> Tensor:
    """Token before each slot, the anchor's for slot 0: [B, A, γ]."""
    slots = torch.arange(batch.slot_mask.shape[-1], device=batch.anchors.device)
    at = (batch.anchors[..., None] + slots).clamp(max=batch.input_ids.shape[1] - 1)
    return batch.input_ids.gather(1, at.flatten(1)).view_as(at)


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()
