"""DeepSpec's objective: cross-entropy to the text, L1 to the target's distribution, and a calibrated confidence.

With w_k = exp(-k/γ_decay) for the slots that count and 0 for all others, every term is Σ w·term / (Σ w + 1e-6) over the
slots of one optimiser step, however it is cut into micro-batches and processes:

    CE   = -log p(token)                 p: the draft's distribution in the slot
    L1   = Σ_v |p_v - q_v|               q: the target's, softmax(logits of its last hidden state); this is 2 x TV
    BCE  of the confidence logit against the acceptance rate 1 - L1/2, which carries no gradient

    loss = α_ce·CE + α_l1·L1 + α_conf·BCE
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.dspark import Draft, DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import finish_logits
from nemotron_dspark.training.batches import Batch
from nemotron_dspark.training.fused import slot_losses
from nemotron_dspark.training.metrics import StepSums

EPSILON = 1e-6


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

    @property
    def value(self) -> Tensor:
        """The loss where this micro-batch is the whole step."""
        return self.total / (self.sums.weight + EPSILON)


class Objective(nn.Module):
    """A draft and its loss as one module: in its forward sharded parameters are full, and the loss needs some."""

    draft: Draft
    needs_target: bool  # the loss reads the target's last hidden states, and so measures acceptance
    measures_confidence: bool

    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch."""
        raise NotImplementedError


class DSparkObjective(Objective):
    """The objective of a DSpark draft."""

    def __init__(self, draft: DSparkDraft, weights: LossWeights):
        super().__init__()
        self.draft = draft
        self.weights = weights
        self.needs_target = weights.needs_target
        self.measures_confidence = weights.confidence > 0

    def forward(self, batch: Batch) -> Loss:
        hidden = self.draft(batch.input_ids, batch.taps, batch.anchors, batch.valid)
        return dspark_loss(self.draft, hidden, batch, self.weights)


def objective_for(draft: Draft, config: TrainConfig) -> Objective:
    """The objective of a draft of its kind."""
    if isinstance(draft, DSparkDraft):
        return DSparkObjective(draft, LossWeights.of(config, draft))
    raise TypeError(f"there is no objective for {type(draft).__name__}")


def dspark_loss(
    draft: DSparkDraft,
    hidden: Tensor,  # [B, A, γ, H] from draft.forward
    batch: Batch,
    weights: LossWeights,
) -> Loss:
    """The loss of one micro-batch. Slots that do not count are left out before the vocabulary is touched.

    Raises:
        InputError: a term needs the target's last hidden states and ``batch`` has none.
    """
    if weights.needs_target and batch.last is None:
        raise InputError(
            "The cache holds no last hidden states.",
            "Build it again, or train on cross-entropy alone (train.l1_alpha=0 train.confidence_alpha=0).",
        )
    rows, blocks, slots = batch.counted.nonzero(as_tuple=True)  # [N] each
    place = rows * batch.input_ids.shape[1] + batch.anchors[rows, blocks] + slots
    place, order = place.sort(stable=True)  # the position whose next token the slot predicts, in the flattened batch
    rows, blocks, slots = rows[order], blocks[order], slots[order]
    previous = _previous_tokens(batch)  # [B, A, γ]

    hidden_n = hidden[rows, blocks, slots]  # [N, H]
    # Once for both heads: its gradient is as large as the vocabulary.
    embedded = draft.markov_head.embed(previous, hidden.dtype)
    latents = draft.markov_head.latents(hidden, embedded)
    weight = torch.ones(len(place), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    if weights.decay is not None:
        weight = torch.exp(-slots.to(weight.dtype) / weights.decay)
    zero = weight.new_zeros(())
    places, position = place.unique_consecutive(return_inverse=True)
    total, ce, l1 = slot_losses(
        hidden_n,
        None if latents is None else latents[rows, blocks, slots],
        draft.lm_head.weight,
        None if latents is None else draft.markov_head.markov_w2.weight.to(hidden.dtype),
        batch.input_ids.flatten()[place + 1],
        (weights.ce * weight, weights.l1 * weight),
        batch.last.flatten(0, 1)[places].to(hidden.dtype) if weights.needs_target else None,
        position,
        partial(
            finish_logits,
            multiplier=draft.config.target_logit_multiplier,
            softcap=draft.config.target_logit_softcap,
        ),
    )
    ce_sum = (weight * ce).sum()
    l1_sum = (weight * l1).sum() if l1 is not None else zero
    accept = (1 - l1 / 2).clamp(0, 1) if l1 is not None else None
    confidence_sum = zero
    if weights.confidence:
        seen = embedded[rows, blocks, slots] if draft.config.confidence_head_with_markov else None
        logit = _wide(draft.confidence_head(hidden_n, seen))
        bce = functional.binary_cross_entropy_with_logits(logit, accept, reduction="none")
        confidence_sum = (weight * bce).sum()

    accepted = zero.expand(batch.counted.shape[-1])
    tau = zero
    if accept is not None:
        rates = accept.new_zeros(batch.counted.shape)
        rates[rows, blocks, slots] = accept
        accepted = rates.sum(dim=(0, 1))
        reached = batch.counted[..., 0]
        tau = ((1 + rates.cumprod(dim=-1).sum(dim=-1)) * reached).sum()
    sums = StepSums(
        loss=total.detach() + weights.confidence * confidence_sum.detach(),
        weight=weight.sum(),
        ce=ce_sum.detach(),
        l1=l1_sum.detach(),
        confidence=confidence_sum.detach(),
        blocks=batch.counted[..., 0].sum(),
        tau=tau,
        tokens=torch.full((), batch.tokens, device=hidden.device),
        slots=batch.counted.sum(dim=(0, 1)),
        accepted=accepted,
    )
    return Loss(total + weights.confidence * confidence_sum, sums)


def _previous_tokens(batch: Batch) -> Tensor:
    """Token before each slot, the anchor's for slot 0: [B, A, γ]."""
    slots = torch.arange(batch.counted.shape[-1], device=batch.anchors.device)
    at = (batch.anchors[..., None] + slots).clamp(max=batch.input_ids.shape[1] - 1)
    return batch.input_ids.gather(1, at.flatten(1)).view_as(at)


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()
