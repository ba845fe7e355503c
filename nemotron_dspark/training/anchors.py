"""Where blocks start and which of their slots count.

A draw depends on (seed, epoch, sample) alone: neither on the batch a sample falls into nor on what ran before, so a
resumed run needs no generator state.
"""

import numpy as np
import torch
from torch import Tensor

_ORDER, _ANCHORS, _ROUNDS = 0, 1, 2  # keeps the uses of a seed apart


def draw_anchors(
    loss_mask: Tensor,  # [S] bool
    num_anchors: int,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
) -> Tensor:
    """Positions p with ``loss_mask[p]`` and ``loss_mask[p + 1]``, ascending, int64 [at most num_anchors].

    Drawn uniformly without replacement where there are more.
    """
    candidates = (loss_mask[:-1] & loss_mask[1:]).nonzero()[:, 0]
    if len(candidates) <= num_anchors:
        return candidates
    generator = np.random.default_rng([_ANCHORS, seed, epoch, sample_id])
    drawn = generator.choice(len(candidates), num_anchors, replace=False, shuffle=False)
    return candidates[torch.from_numpy(np.sort(drawn))]


def counted_slots(
    loss_mask: Tensor,  # [S] bool
    anchors: Tensor,  # [A] positions
    block_size: int,
) -> Tensor:
    """Bool [A, γ]: slot k counts while the tokens anchor + 1 to anchor + k + 1 all exist and carry loss."""
    after = anchors[:, None] + torch.arange(1, block_size + 1)
    inside = after < len(loss_mask)
    return (inside & loss_mask[after.clamp(max=len(loss_mask) - 1)]).cumprod(dim=1).bool()


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The samples in the order of one epoch, int64 [num_samples]."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(num_samples)


def round_order(num_samples: int, *, seed: int, number: int) -> np.ndarray:
    """The samples in the order in which round ``number`` of a rolling cache takes them, int64 [num_samples]."""
    return np.random.default_rng([_ROUNDS, seed, number]).permutation(num_samples)
