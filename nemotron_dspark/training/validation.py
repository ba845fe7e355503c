"""A held-out part of the samples, measured with the training objective now and then, and never trained on.

A sample is held out by a hash of the tokens before its first answer: all samples of a conversation, and copies of it,
are on the same side, whatever their order. Anchors are the same in every measurement, so that curves compare.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemotron_dspark import files
from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.batches import Loader
from nemotron_dspark.training.loggers import MEASURED
from nemotron_dspark.training.metrics import MetricAccumulator, StepMetrics, StepSums, read_lines
from nemotron_dspark.training.objective import Objective
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.source import SampleLike, Source

FILE = "validation.jsonl"


class TrainedPart(Source):
    """The samples of ``source`` that are trained on, numbered from 0."""

    def __init__(self, source: Source, ids: np.ndarray):
        self._source, self._ids = source, ids
        self.lengths = source.lengths[ids]
        self.open, self.saved, self.close = source.open, source.saved, source.close

    def schedule(self, config: TrainConfig, context: DistContext = SINGLE) -> SampleSchedule:
        return (
            super().schedule(config, context) if self._source.random_access else self._source.schedule(config, context)
        )

    @property
    def stopping(self) -> bool:
        return self._source.stopping

    def prefetch(self, ids: Sequence[int], step: int) -> None:
        self._source.prefetch(self._ids[list(ids)].tolist(), step)

    def samples(self, ids: Sequence[int], step: int) -> Sequence[SampleLike]:
        return self._source.samples(self._ids[list(ids)].tolist(), step)


def split(source: Source, share: float) -> tuple[Source, np.ndarray]:
    """The samples to train on, and the numbers in ``source`` of those that are held out, about ``share`` of all.

    Raises:
        InputError: one side would be empty.
    """
    if not share:
        return source, np.arange(0)
    digests = (
        hashlib.blake2b(source.opening(at).tobytes(), digest_size=8).digest() for at in range(len(source.lengths))
    )
    chosen = np.array([int.from_bytes(digest) < share * 2.0**64 for digest in digests])
    if chosen.all() or not chosen.any():
        raise InputError(
            f"train.validation={share:g} holds out {'all' if chosen.all() else 'none'} of {len(chosen)} samples.",
            "Give more conversations, or another share; 0 holds nothing out.",
        )
    source.hold_out(np.flatnonzero(chosen))
    return TrainedPart(source, np.flatnonzero(~chosen)), np.flatnonzero(chosen)


@dataclasses.dataclass(frozen=True)
class HeldOutResult:
    """Averages over the held-out samples."""

    metrics: StepMetrics
    best: bool  # better than all before


def score(line: dict[str, Any]) -> float:
    """What is to be high: the expected accepted length, or where it is not measured the negative loss."""
    return line["tau"] if line["tau"] is not None else -line["loss"]


class Validation:
    """Measures the held-out samples of a run and remembers, in its folder, when they were best."""

    def __init__(self, ids: np.ndarray, source: Source, config: TrainConfig, steps_per_epoch: int, run_folder: Path):
        self.ids = ids[np.argsort(-source.lengths[ids], kind="stable")]
        self._source = source
        self._config = config
        self._every = config.validate_every or steps_per_epoch
        self._file = run_folder / FILE
        self.lines: list[dict[str, Any]] = []

    def resume(self, step: int, *, write: bool) -> None:
        """Forget what was measured after ``step`` steps."""
        self.lines = [line for line in read_lines(self._file) if line["step"] <= step]
        if write:
            files.write_text(self._file, "".join(files.json_line(line) for line in self.lines))

    def due(self, step: int, total: int) -> bool:
        """Whether to measure after ``step`` steps."""
        return step % self._every == 0 or step == total

    @property
    def best(self) -> dict[str, Any] | None:
        """The line of the best measurement so far, the first of equals."""
        return max(self.lines, key=score, default=None)

    @property
    def exhausted(self) -> bool:
        """Whether the last `train.patience` measurements were no better than one before them."""
        patience, best = self._config.patience, self.best
        return patience is not None and best is not None and len(self.lines) - 1 - self.lines.index(best) >= patience

    def measure(self, objective: Objective, load: Loader, step: int, context: DistContext) -> HeldOutResult:
        """Averages over the held-out samples; every rank takes as many micro-batches, some of them twice."""
        config, device = self._config, load.device
        count = -(-len(self.ids) // (config.local_batch_size * context.world_size))
        load = dataclasses.replace(load, source=self._source)
        sums = StepSums.zeros(objective.draft.config.block_size, device)
        correct = torch.zeros((), dtype=torch.float64, device=device)  # slots whose likeliest token is the target's
        with torch.no_grad():
            for ids in np.array_split(self.ids, count * context.world_size)[context.rank :: context.world_size]:
                found = objective(load(0, ids if len(ids) else self.ids[-1:]).to(device))
                if len(ids):
                    sums += found.sums
                    correct += found.details["correct"].sum() if objective.needs_target else 0
        total = StepSums.from_tensor(context.all_reduce_sum(sums.to_tensor()))
        metrics = MetricAccumulator(total).summary(
            measured=objective.measured,
            step=step,
            epoch=load.schedule.epoch(step - 1),
            lr=0.0,
            grad_norm=0.0,
        )
        if objective.needs_target:
            share = float(context.all_reduce_sum(correct)) / max(1.0, float(total.slots.sum()))
            metrics = dataclasses.replace(metrics, top1=share)
        line = {key: value for key, value in dataclasses.asdict(metrics).items() if key in _MEASURED}
        best = self.best is None or score(line) > score(self.best)
        self.lines.append(line)
        if context.is_main:
            with files.disk_errors(self._file), open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return HeldOutResult(metrics, best)

    def summary(self) -> str:
        """A sentence on when the held-out part was best, and whether training went on for too long."""
        best, last = self.best, self.lines[-1]
        if best is None or best is last:
            return f"{len(self.ids)} held-out samples: {_said(last)} at step {last['step']}, the best so far."
        return (
            f"{len(self.ids)} held-out samples were best at step {best['step']} ({_said(best)}) and worse after it "
            f"({_said(last)} at step {last['step']}): the draft of step {best['step']} is the one that is published."
        )


_MEASURED = ("step", "epoch", *MEASURED)


def _said(line: dict[str, Any]) -> str:
    tau = f", tau {line['tau']:.3f}" if line["tau"] is not None else ""
    top1 = f", top-1 {line['top1']:.1%}" if line.get("top1") is not None else ""
    return f"loss {line['loss']:.4f}{tau}{top1}"
