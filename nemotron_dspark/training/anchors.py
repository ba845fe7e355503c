"""Where blocks start and which of their slots count.

A draw depends on (seed, epoch, sample) alone: neither on the batch a sample falls into nor on what ran before, so a
resumed run needs no generator state.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_ORDER, _ANCHORS, _CYCLES, _STRETCHES = 0, 1, 2, 3  # keeps the uses of a seed apart


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


def draw_stretch(
    loss_mask: Tensor,  # [S] bool
    window: int,  # less than S
    *,
    seed: int,
    epoch: int,
    sample_id: int,
) -> slice:
    """``window`` positions in a row in which a block may start, if one may anywhere."""
    candidates = (loss_mask[:-1] & loss_mask[1:]).nonzero()[:, 0]
    generator = np.random.default_rng([_STRETCHES, seed, epoch, sample_id])
    chosen = int(candidates[generator.integers(len(candidates))]) if len(candidates) else 0
    before = int(generator.integers(window - 1))  # the token behind the chosen one is inside, too
    first = min(max(0, chosen - before), len(loss_mask) - window)
    return slice(first, first + window)


def loss_slots(
    loss_mask: Tensor,  # [S] bool
    anchors: Tensor,  # [A] positions
    block_size: int,
) -> Tensor:
    """Bool [A, γ]: slot k counts while the tokens anchor + 1 to anchor + k + 1 all exist and carry loss."""
    after = anchors[:, None] + torch.arange(1, block_size + 1)
    inside = after < len(loss_mask)
    return (inside & loss_mask[after.clamp(max=len(loss_mask) - 1)]).cumprod(dim=1).bool()


def unrolled_slots(
    loss_mask: Tensor,  # [S] bool
    anchors: Tensor,  # [A] positions from 1 on
    steps: int,
) -> Tensor:
    """Bool [A, steps]: EAGLE-3's step s counts where the token anchor - 1 + s carries loss and is not the last one."""
    at = anchors[:, None] - 1 + torch.arange(steps)
    return (at < len(loss_mask) - 1) & loss_mask[at.clamp(max=len(loss_mask) - 1)]


@dataclasses.dataclass(frozen=True)
class LossSlots:
    """The slots of a micro-batch that carry loss, in the order of the positions they predict from.

    Made on the host together with the batch: a GPU would have to be waited for to know how many there are.
    """

    index: Tensor  # int64 [N] slots, in the flattened [B, A, γ]
    positions: Tensor  # int64 [P] of the target's states they are measured against, in the flattened [B, S], ascending
    position: Tensor  # int64 [N] which of ``positions`` each slot has, ascending
    host_position: list[int]  # the same, for cutting the slots into chunks

    @staticmethod
    def of(
        anchors: Tensor,  # [B, A] positions
        slot_mask: Tensor,  # bool [B, A, γ]
        length: int,  # S
    ) -> "LossSlots":
        rows, blocks, slots = slot_mask.nonzero(as_tuple=True)
        place, order = (rows * length + anchors[rows, blocks] + slots).sort(stable=True)
        index = slot_mask.flatten().nonzero()[:, 0][order]
        positions, position = place.unique_consecutive(return_inverse=True)
        return LossSlots(index, positions, position, position.tolist())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "LossSlots":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "LossSlots":
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> "LossSlots":
        return LossSlots(move(self.index), move(self.positions), move(self.position), self.host_position)


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The samples in the order of one epoch, int64 [num_samples]."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(num_samples)


def cycle_order(num_samples: int, *, seed: int, number: int) -> np.ndarray:
    """The samples in the order in which cycle ``number`` of a rolling cache takes them, int64 [num_samples]."""
    return np.random.default_rng([_CYCLES, seed, number]).permutation(num_samples)
