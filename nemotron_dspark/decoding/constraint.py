"""What an answer must look like, token by token, and how likely the target held each of its tokens.

A constraint forbids tokens to the target alone. What it forbids has probability 0 in the target's distribution, so a
draft of such a token is always rejected and its replacement is drawn from what is allowed: the answer is distributed as
the constrained target's, whatever the draft proposes (Leviathan et al. 2023, theorem 1, with the masked p).
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Constraint(Protocol):
    """The rules of one answer, and how far it has come. Only the decoder's thread calls it."""

    def forbidden(self, drafted: Sequence[int]) -> Tensor:
        """What must not follow the answer, and the answer with each prefix of ``drafted``: [n, V] bool, n ≥ 1.

        Rows end where a drafted token is forbidden itself.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """``tokens`` were appended to the answer."""
        ...


def forbid(
    logits: Tensor,  # [B, n + 1, V]
    drafted: Sequence[Sequence[int]],  # up to n tokens a row
    constraints: Sequence[Constraint | None],
) -> Tensor:
    """``logits`` with -inf for what the rows' constraints forbid; the same tensor where there are none."""
    if any(constraint is not None for constraint in constraints):
        logits = logits.clone()
        for row, tokens, constraint in zip(logits, drafted, constraints, strict=True):
            if constraint is not None:
                forbidden = constraint.forbidden(tokens).to(logits.device)
                row[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
    return logits


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely the target held a token that was taken; natural logarithms, at temperature 1, without constraints."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens in its place, likeliest first


def likelihoods(logits: Tensor, tokens: Sequence[int], count: int) -> list[Likelihood]:
    """Likelihoods of ``tokens``, each drawn from a row of ``logits`` [n, V], and of the ``count`` likeliest ones."""
    logprobs = torch.log_softmax(logits[: len(tokens)].float(), -1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(count)
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [Likelihood(value, tuple(zip(*each, strict=True))) for value, each in zip(own, rows, strict=True)]
