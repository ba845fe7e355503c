"""Accept or reject drafted tokens so that the output stays distributed as the target's.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1; chain drafts only.
"""

from torch import Tensor

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
    target_probs: Tensor,  # [n + 1, V], rows sum to 1
    draft_probs: Tensor,  # [n, V], rows sum to 1; what each draft token was drawn from
    draft_tokens: Tensor,  # [n]
    uniforms: Tensor,  # [n + 1] in [0, 1): one per draft, one for the token that follows
) -> tuple[int, int]:
    """Longest accepted prefix of ``draft_tokens`` and the token that follows it.

    Draft token x survives with probability min(1, p(x) / q(x)). The token that follows is drawn from the residual
    max(0, p - q) at the first rejection, or from the last row of ``target_probs`` when every draft survives.
    """
    count = draft_tokens.shape[0]
    if count:
        p = target_probs[:count].gather(1, draft_tokens[:, None])[:, 0]
        q = draft_probs.gather(1, draft_tokens[:, None])[:, 0]
        survives = uniforms[:count].to(p.device) * q < p
        kept = int(survives.cumprod(0).sum())
    else:
        kept = 0
    if kept == count:
        following = target_probs[count]
    else:
        following = (target_probs[kept] - draft_probs[kept]).clamp_(min=0)
        if not bool(following.sum() > 0):  # p = q up to rounding, and the draw fell on the rounding
            following = target_probs[kept]
    return kept, int(pick(following, uniforms[count]))
