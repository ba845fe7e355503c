"""The sums that a loss and its metrics are quotients of, by name."""

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class StepSums:
    """Sums over the slots of a micro-batch, of an optimiser step, or of the steps since a line of metrics. Detached."""

    loss: Tensor  # Σ w·loss
    weight: Tensor  # Σ w
    ce: Tensor  # Σ w·CE
    l1: Tensor  # Σ w·L1
    confidence: Tensor  # Σ w·BCE
    blocks: Tensor  # blocks with at least one slot that counts
    tau: Tensor  # sum over them of 1 + Σ_k Π_{j≤k} acceptance_j, the expected tokens per round
    slots: Tensor  # [γ] slots that count
    accepted: Tensor  # [γ] sum of their acceptance rates

    @staticmethod
    def zeros(block_size: int, device: torch.device | None = None) -> "StepSums":
        return StepSums.from_tensor(torch.zeros(_SCALARS + 2 * block_size, dtype=torch.float64, device=device))

    @staticmethod
    def from_tensor(values: Tensor) -> "StepSums":
        """What `to_tensor` gave."""
        slots, accepted = values[_SCALARS:].chunk(2)
        return StepSums(*values[:_SCALARS].unbind(), slots, accepted)

    def to_tensor(self) -> Tensor:
        """All in one vector, to be added or all-reduced: [7 + 2γ] fp64."""
        return torch.cat([getattr(self, name).double().reshape(-1) for name in _NAMES])

    @staticmethod
    def from_json(content: dict[str, Any]) -> "StepSums":
        """What `to_json` gave; `KeyError` when a name is missing."""
        return StepSums(*(torch.tensor(content[name], dtype=torch.float64) for name in _NAMES))

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in _NAMES}

    def __add__(self, other: "StepSums") -> "StepSums":
        return StepSums.from_tensor(self.to_tensor() + other.to_tensor())


_NAMES = tuple(field.name for field in dataclasses.fields(StepSums))
_SCALARS = len(_NAMES) - 2
