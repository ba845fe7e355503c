"""What a run reports: sums over a window of steps, one JSON line per window, and TensorBoard where it is installed."""

import dataclasses
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_dspark import files
from nemotron_dspark.training.objective import LossWeights
from nemotron_dspark.training.step_sums import StepSums

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


class Window:
    """Sums since the last line. Its `sums` go into a checkpoint, so that a resumed run writes the same lines."""

    def __init__(self, sums: StepSums):
        self.sums = sums
        self._started = time.monotonic()
        self._tokens = 0

    def add(self, sums: StepSums, tokens: int) -> None:
        self.sums += sums
        self._tokens += tokens

    def summary(self, weights: LossWeights, *, step: int, epoch: int, lr: float, grad_norm: float) -> StepMetrics:
        sums = self.sums
        measured = weights.needs_target
        return StepMetrics(
            step,
            epoch,
            _ratio(sums.loss, sums.weight),
            _ratio(sums.ce, sums.weight),
            _ratio(sums.l1, sums.weight) if measured else None,
            _ratio(sums.confidence, sums.weight) if weights.confidence else None,
            [_ratio(*pair) for pair in zip(sums.accepted, sums.slots, strict=True)] if measured else None,
            _ratio(sums.tau, sums.blocks) if measured else None,
            lr,
            grad_norm,
            self._tokens / max(time.monotonic() - self._started, 1e-9),
            _memory_mb(),
        )


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events in a run's folder."""

    def __init__(self, run_folder: Path, resumed_step: int):
        self._path = run_folder / FILE
        self._drop_after(resumed_step)
        self._events = run_folder / "tensorboard"
        with files.disk_errors(self._events):
            self._board = _tensorboard(self._events, resumed_step)

    def write(self, metrics: StepMetrics) -> None:
        with files.disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        if self._board is None:
            return
        with files.disk_errors(self._events):
            for key, value in dataclasses.asdict(metrics).items():
                for name, number in _scalars(key, value):
                    self._board.add_scalar(name, number, metrics.step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            with files.disk_errors(self._events):
                self._board.close()

    def _drop_after(self, step: int) -> None:
        """Keep the lines up to the checkpoint the run goes on from; the steps after it are done again."""
        kept = [json.dumps(line) for line in read_metrics(self._path.parent) if line["step"] <= step]
        files.write_text(self._path, "".join(line + "\n" for line in kept))


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; one that a kill cut off is left out."""
    path = Path(run_folder) / FILE
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=resumed_step + 1)


def _scalars(key: str, value: Any) -> list[tuple[str, float]]:
    if value is None or key == "step":
        return []
    if isinstance(value, list):
        return [(f"{key}/{slot}", number) for slot, number in enumerate(value)]
    return [(key, value)]


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total) / float(count) if count else 0.0


def _memory_mb() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
