"""What lets the slots of one block know of each other: the sequential head; and what predicts acceptance.

A sequential head turns the previous token (and, for gated and rnn, the slot's hidden state) into a latent vector of
size r; the slot's logits are ``lm_head(hidden) + markov_w2(latent)``. Names and formulas are DeepSpec's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_dspark.drafts.config import DraftConfig
from nemotron_dspark.drafts.layers import Linear


class IndependentSlots(nn.Module):
    """No sequential head (rank 0): slots do not see each other's tokens."""

    markov_w2 = None

    def embed(self, previous: Tensor, dtype: torch.dtype) -> None:
        return None

    def latents(self, hidden: Tensor, embedded: None) -> None:
        return None

    def start(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(0)

    def step(self, base_logits: Tensor, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return base_logits, state


class VanillaHead(nn.Module):
    """latent = W1[previous]: a low-rank table of token pairs."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, self.rank), freeze=False)
        self.markov_w2 = Linear(self.rank, config.num_drafted, bias=False)

    def embed(self, previous: Tensor, dtype: torch.dtype) -> Tensor:
        """W1 of tokens in ``dtype``: [...] to [..., r]."""
        return functional.embedding(previous, self.markov_w1.weight.to(dtype))

    def latents(
        self,
        hidden: Tensor,  # [..., γ, H]
        embedded: Tensor,  # [..., γ, r] of the token before each slot; the anchor for slot 0
    ) -> Tensor:
        """Latent of every slot [..., γ, r]."""
        return embedded

    def start(self, hidden: Tensor) -> Tensor:
        """State before slot 0 of the blocks ``hidden`` [B, γ, H]; empty for the heads without one."""
        return hidden.new_empty(0)

    def step(
        self,
        base_logits: Tensor,  # [B, V]
        hidden: Tensor,  # [B, H]
        previous: Tensor,  # [B]
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the next slot and the state after it."""
        return base_logits + self.markov_w2(self.latents(hidden, self.embed(previous, hidden.dtype))), state


class GatedHead(VanillaHead):
    """latent = σ(G [hidden ; W1[previous]]) ⊙ W1[previous]: the hidden state decides how much the pair counts."""

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self.gate_proj = Linear(config.hidden_size + self.rank, self.rank)

    def latents(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat((hidden, embedded), dim=-1))) * embedded


class RecurrentHead(VanillaHead):
    """A small recurrence over the slots of a block: each slot sees all tokens before it, not only the last."""

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self.joint_proj = Linear(2 * self.rank + config.hidden_size, 3 * self.rank)

    def latents(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        state = embedded.new_zeros(*embedded.shape[:-2], self.rank)
        joint = self.joint_proj.cast_parameters(hidden.dtype)  # once for all slots
        slots = []
        for slot in range(embedded.shape[-2]):
            latent, state = _advance(joint, state, embedded[..., slot, :], hidden[..., slot, :])
            slots.append(latent)
        return torch.stack(slots, dim=-2)

    def start(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), self.rank)

    def step(self, base_logits: Tensor, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.joint_proj.cast_parameters(hidden.dtype)
        latent, state = _advance(joint, state, self.embed(previous, hidden.dtype), hidden)
        return base_logits + self.markov_w2(latent), state


def _advance(
    joint: tuple[Tensor, Tensor | None],  # weight [3r, 2r + H] and bias [3r]
    state: Tensor,  # [..., r]
    embedded: Tensor,  # [..., r]
    hidden: Tensor,  # [..., H]
) -> tuple[Tensor, Tensor]:
    """One slot of the recurrence: its latent and the state after it, [..., r] each."""
    gate, candidate, output = functional.linear(torch.cat((state, embedded, hidden), dim=-1), *joint).chunk(3, dim=-1)
    return torch.tanh(output), torch.lerp(torch.tanh(candidate), state, torch.sigmoid(gate))


_HEADS = {"vanilla": VanillaHead, "gated": GatedHead, "rnn": RecurrentHead}


def build_sequential_head(config: DraftConfig) -> VanillaHead | IndependentSlots:
    """The sequential head that ``config`` names."""
    return _HEADS[config.markov_head_type](config) if config.markov_rank else IndependentSlots()


class ConfidenceHead(nn.Module):
    """One logit per slot: how likely the target accepts the token drafted there."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        extra = config.markov_rank if config.confidence_head_with_markov else 0
        self.proj = Linear(config.hidden_size + extra, 1)

    def forward(
        self,
        hidden: Tensor,  # [..., H]
        embedded: Tensor | None,  # [..., r] W1[previous token], when the head reads it
    ) -> Tensor:
        """Logits [...]."""
        features = hidden if embedded is None else torch.cat((hidden, embedded), dim=-1)
        return self.proj(features).squeeze(-1)
