"""From logits to a distribution to a token, the same way for target and draft.

All randomness of a generation comes from one seeded stream of uniforms, so that a request's answer does not depend on
what is decoded beside it.
"""

import dataclasses

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

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}.", "Use 0 for greedy, or a positive number.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}.", "Use a number above 0 and at most 1.")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}.", "Ask for at least one token.")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [..., V] (fp32) that ``sampling`` draws from, given logits [..., V]; greedy is one-hot."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of everything more likely
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [...] drawn from ``probs`` [..., V], normalised or not, by inverting their CDF at ``uniform`` [...].

    The sum runs in double precision: over 131 072 single-precision terms it would move mass between tokens.
    """
    cumulative = probs.double().cumsum(-1)
    at = uniform.double().to(probs.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)
