"""How many steps, and of how many anchors, a budget of time holds: measured on the run itself before it begins.

Steps are counted, not the time that they take, so that a run that was stopped goes on to the same draft.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.schedule import SampleSchedule

_MICRO_BATCHES, _WARM = 40, 3  # that are timed, behind those that still warm up
_SECONDS, _FEWEST = 60.0, 8  # and fewer, but not fewer than these, when they take longer
_SHARE = 0.95  # of the budget; the rest is for checkpoints, held-out samples and the finished draft
_EPOCHS = 3  # passes over the data that are worth more than further anchors
_FEWEST_ANCHORS = 16
_FEWEST_STEPS = 10

Trial = Callable[[TrainConfig, Callback], None]  # begins a run


class _Measured(Exception):
    """A trial has run for long enough."""


class _Pace(Callback):
    """Times a run's micro-batches, one a step, and then ends it."""

    def __init__(self, context: DistContext) -> None:
        self._context = context
        self._began, self._ended = time.monotonic(), list[float]()

    def on_begin(self, schedule: SampleSchedule, first_step: int) -> None:
        self.setup, self.samples = time.monotonic() - self._began, schedule.num_samples

    def on_micro_batch(self, step: int, done: int) -> None:
        self._ended.append(time.monotonic())
        timed = len(self._ended) - _WARM
        if timed <= 0 or timed % _FEWEST:
            return
        enough = timed >= _MICRO_BATCHES or timed * self.seconds >= _SECONDS
        if self._context.all_reduce_sum(torch.tensor(enough)):  # the clocks differ, and all must end at the same one
            raise _Measured

    @property
    def seconds(self) -> float:
        """Seconds of a micro-batch, by those behind the warm-up."""
        return (self._ended[-1] - self._ended[_WARM - 1]) / (len(self._ended) - _WARM)


@dataclasses.dataclass(frozen=True)
class _StepCost:
    """Seconds, alike on all processes."""

    step: float
    setup: float
    left: float  # of the budget
    schedule: SampleSchedule  # of the run that is to come

    @property
    def steps(self) -> int:
        """Steps that there is time for."""
        return int((self.left - self.setup) / self.step)


def fit(config: TrainConfig, seconds: float, trial: Trial, context: DistContext) -> TrainConfig:
    """``config`` with the steps, and if need be fewer anchors, that train within ``seconds`` from now.

    As many epochs as there is time for, at most ``config.epochs``; where fewer than three would go by, half as many
    anchors are drawn, a quarter, and so on. Measuring is part of the budget.

    Raises:
        InputError: the budget ends before ten steps are done; and whatever a trial raises.
    """
    began, deadline = time.monotonic(), time.monotonic() + _SHARE * seconds

    def measured(anchors: int) -> _StepCost:
        pace = _Pace(context)
        alone = config.local_batch_size * context.world_size
        short = {"num_anchors": anchors, "global_batch_size": alone, "max_steps": 2 * _MICRO_BATCHES}
        with contextlib.suppress(_Measured):
            trial(config.model_copy(update=short | {"validation": 0.0, "tracker": None}), pace)
        kept = SampleSchedule.of(config, round(pace.samples * (1 - config.validation)), context)
        times = torch.tensor([pace.seconds * kept.accumulation, pace.setup, deadline - time.monotonic()])
        step, setup, left = (context.all_reduce_sum(times) / context.world_size).tolist()
        return _StepCost(step, setup, left, kept)

    anchors, found = config.num_anchors, measured(config.num_anchors)
    if found.steps < _EPOCHS * found.schedule.steps_per_epoch and anchors > _FEWEST_ANCHORS:
        # A step's cost is nearly linear in its anchors: between two of them the number is chosen, then measured.
        least = measured(_FEWEST_ANCHORS)
        slope = (found.step - least.step) / (anchors - _FEWEST_ANCHORS)
        steps = _EPOCHS * found.schedule.steps_per_epoch + math.ceil(_MICRO_BATCHES / found.schedule.accumulation)
        most = (least.left - 2 * least.setup) / steps  # seconds that a step may take
        while anchors > _FEWEST_ANCHORS and least.step + slope * (anchors - _FEWEST_ANCHORS) > most:
            anchors = max(_FEWEST_ANCHORS, anchors // 2)
        found = measured(anchors)
    if found.steps < _FEWEST_STEPS:
        needed = (_FEWEST_STEPS * found.step + found.setup + time.monotonic() - began) / _SHARE
        raise InputError(
            f"The budget ends after {max(0, found.steps)} optimiser steps, which take {found.step:.3g} s each.",
            f"Give at least {needed / 60:.1f} minutes, or lower train.global_batch_size ({config.global_batch_size}).",
        )
    steps = min(found.steps, config.epochs * found.schedule.steps_per_epoch)
    return config.model_copy(update={"max_steps": steps, "num_anchors": anchors})
