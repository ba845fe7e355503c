"""Accept or reject drafted tokens so that the output stays distributed as the target's.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1; chain drafts only.
"""

import torch
from torch import Tensor
from torch.nn import functional

from nemotron_dspark.decoding.sampling import pick


def accept_greedy(target_tokens: list[int], draft_tokens: list[int]) -> tuple[int, int]:
    """Longest prefix of ``draft_tokens`` (n) that the target would have picked itself, and the token that follows it.

    ``target_tokens`` (n + 1) are the target's most likely tokens after the anchor and after each draft.
    """
    kept = 0
    while kept < len(draft_tokens) and draft_tokens[kept] == target_tokens[kept]:
        kept += 1
    return kept, target_tokens[kept]


def accept_sampled(
    target_probs: Tensor,  # [B, n + 1, V], rows sum to 1
    draft_probs: Tensor,  # [B, n, V], rows sum to 1; what each draft token was drawn from
    draft_tokens: Tensor,  # [B, n]
    counts: Tensor,  # [B] drafts proposed, at most n; later ones are not there
    uniforms: Tensor,  # [B, n + 1] in [0, 1): one per draft, the last for the token that follows
) -> tuple[Tensor, Tensor]:
    """Longest accepted prefix of each row's drafts [B] and the token that follows it [B].

    Draft token x survives with probability min(1, p(x) / q(x)). The token that follows is drawn from the residual
    max(0, p - q) at the first rejection, or from p itself when every proposed draft survives. A greedy row, whose p
    and q are one-hot, keeps exactly the drafts that equal the target's choice.
    """
    rows, slots = draft_tokens.shape
    p = target_probs[:, :slots].gather(2, draft_tokens[..., None])[..., 0]
    q = draft_probs.gather(2, draft_tokens[..., None])[..., 0]
    survives = (uniforms[:, :slots] * q < p) & (torch.arange(slots, device=p.device) < counts[:, None])
    kept = survives.long().cumprod(1).sum(1)  # [B]
    each = torch.arange(rows, device=p.device)
    at_end = target_probs[each, kept]  # [B, V]
    rejected = functional.pad(draft_probs, (0, 0, 0, 1))[each, kept] * (kept < counts)[:, None]
    residual = (at_end - rejected).clamp_(min=0)
    # Where p = q up to rounding and the draw fell on the rounding, nothing is left: p itself is right then.
    following = torch.where(residual.sum(-1, keepdim=True) > 0, residual, at_end)
    return kept, pick(following, uniforms[:, slots])
