"""What a run reports: sums over steps by name, and a JSON line for every few of them."""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: averages over the steps since the line before. None: not measured in this run."""

    step: int  # optimiser steps done
    epoch: int  # of the last step, from 0
    loss: float  # mean over slots, as the terms are
    ce: float
    l1: float | None  # 2 x total variation
    confidence: float | None  # BCE of the confidence head
    accept_rate: list[float] | None  # per slot, over the slots that count
    tau: float | None  # expected tokens per verification round, bonus included
    lr: float  # of the last step
    grad_norm: float  # of the last step, before clipping
    tokens_per_second: float  # tokens of the samples seen, without padding
    memory_mb: float  # highest so far: device memory on CUDA, else resident memory
    top1: float | None = None  # share of slots whose likeliest token is the target's; of held-out samples alone


@dataclasses.dataclass
class StepSums:
    """What a micro-batch, a step, or several steps add up to; averages are made of it when a line is written."""

    loss: Tensor  # Σ of the weighted terms, as each of the next three a scalar
    weight: Tensor  # Σ w over slots
    ce: Tensor
    l1: Tensor
    confidence: Tensor
    blocks: Tensor  # blocks with at least one slot that carries loss
    tau: Tensor  # sum over them of the expected tokens per round
    tokens: Tensor  # of the samples, without padding
    slots: Tensor  # [γ] slots that carry loss
    accepted: Tensor  # [γ] sum of their acceptance rates

    @staticmethod
    def zeros(block_size: int, device: torch.device | str = "cpu") -> "StepSums":
        return StepSums.from_tensor(torch.zeros(8 + 2 * block_size, dtype=torch.float64, device=device))

    @staticmethod
    def from_tensor(values: Tensor) -> "StepSums":
        """The inverse of `to_tensor`."""
        slots, accepted = values[8:].chunk(2)
        parts = (*values[:8].unbind(), slots, accepted)
        return StepSums(**{field.name: part for field, part in zip(dataclasses.fields(StepSums), parts, strict=True)})

    def to_tensor(self) -> Tensor:
        """All sums in one vector, fp64 [8 + 2γ], to be reduced over processes."""
        *scalars, slots, accepted = (getattr(self, field.name).double() for field in dataclasses.fields(self))
        return torch.cat((torch.stack(scalars), slots, accepted))

    def __add__(self, other: "StepSums") -> "StepSums":
        return StepSums.from_tensor(self.to_tensor() + other.to_tensor())

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "StepSums":
        return StepSums(**{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


class MetricAccumulator:
    """Sums over the steps since the last line; a checkpoint has them, so that a resumed run writes the same lines."""

    def __init__(self, sums: StepSums):
        self.sums = sums
        self._started = time.monotonic()
        self._tokens = 0.0  # of this process's life: a rate

    def add(self, sums: StepSums) -> None:
        self.sums = self.sums + sums
        self._tokens += float(sums.tokens)

    def summary(self, *, measured: Collection[str], step: int, epoch: int, lr: float, grad_norm: float) -> StepMetrics:
        """The averages; of l1, confidence and acceptance those that the objective has ``measured``."""
        sums = {name: getattr(self.sums, name).tolist() for name in vars(self.sums)}
        loss, ce, l1, bce = (_ratio(sums[name], sums["weight"]) for name in ("loss", "ce", "l1", "confidence"))
        rates = [_ratio(*pair) for pair in zip(sums["accepted"], sums["slots"], strict=True)]
        return StepMetrics(
            step,
            epoch,
            loss,
            ce,
            l1 if "l1" in measured else None,
            bce if "confidence" in measured else None,
            rates if "acceptance" in measured else None,
            _ratio(sums["tau"], sums["blocks"]) if "acceptance" in measured else None,
            lr,
            grad_norm,
            self._tokens / max(time.monotonic() - self._started, 1e-9),
            _memory_mb(),
        )


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; one that a kill cut off is left out."""
    return read_lines(Path(run_folder) / FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where there is no file; a line that a kill cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0


def _memory_mb() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
