"""From logits to a distribution to a token, the same way for target and draft.

All randomness of a generation comes from one seeded stream of uniforms, so that a request's answer does not depend on
what is decoded beside it.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_dspark.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one generation picks its tokens and when it ends."""

    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # smallest set of tokens whose probabilities reach this
    seed: int | None = None  # None = drawn from the operating system
    max_new_tokens: int = 2048
    speculative: bool = True  # False = no drafts, one token of the target's a round
    logprobs: int | None = None  # record how likely the target held each token, and this many of the likeliest

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}.", "Use 0 for greedy, or a positive number.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}.", "Use a number above 0 and at most 1.")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}.", "Ask for at least one token.")


def probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The distributions [B, ..., V] (fp32) that rows draw from, given logits [B, ..., V]; greedy rows are one-hot."""
    shape = (-1, *[1] * (logits.dim() - 1))
    temperature = torch.tensor([sampling.temperature for sampling in samplings], device=logits.device).view(shape)
    greedy = temperature == 0
    probs = torch.softmax(logits.float() / temperature.masked_fill(greedy, 1.0), dim=-1)
    if any(sampling.top_p < 1 for sampling in samplings):
        top_p = torch.tensor([sampling.top_p for sampling in samplings], device=logits.device).view(shape)
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of everything more likely
        ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    if any(sampling.temperature == 0 for sampling in samplings):
        one_hot = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(greedy, one_hot, probs)
    return probs


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [...] drawn from ``probs`` [..., V], normalised or not, by inverting their CDF at ``uniform`` [...].

    The sum runs in double precision: over 131 072 single-precision terms it would move mass between tokens.
    """
    cumulative = probs.double().cumsum(-1)
    at = uniform.double().to(probs.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)
