"""What a run tells while it runs. A display, loggers and whatever else follows a run are callbacks."""

from collections.abc import Callable, Iterable
from pathlib import Path

from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.schedule import SampleSchedule


class Callback:
    """Does nothing at any event; a subclass overrides those it follows. Every rank has callbacks of its own."""

    def on_begin(self, schedule: SampleSchedule, first_step: int) -> None:
        """The first step is about to run; ``first_step`` steps were done before, by an earlier call."""

    def on_micro_batch(self, step: int, done: int) -> None:
        """``done`` micro-batches of step ``step`` (from 0) have gone through forward and backward."""

    def on_step_end(self, step: int) -> None:
        """``step`` optimiser steps are done."""

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Averages since the last call, every `train.log_every` steps."""

    def on_validation(self, metrics: StepMetrics, best: bool) -> None:
        """Averages over the held-out samples; ``best``: better than every time before."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint after ``step`` steps is on the disk."""

    def on_message(self, text: str) -> None:
        """A sentence for the person who runs it."""

    def on_status(self, text: str) -> None:
        """A short status, such as how far the target's captures are; called from any thread, often."""

    def on_end(self) -> None:
        """The run has ended, in whatever way."""


def _each(event: str) -> Callable[..., None]:
    def call(self: "Callbacks", *arguments: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    return call


class Callbacks(Callback):
    """Several callbacks as one; each event goes to all of them in their order."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        self.callbacks = tuple(callbacks)

    on_begin = _each("on_begin")
    on_micro_batch = _each("on_micro_batch")
    on_step_end = _each("on_step_end")
    on_metrics = _each("on_metrics")
    on_validation = _each("on_validation")
    on_checkpoint = _each("on_checkpoint")
    on_message = _each("on_message")
    on_status = _each("on_status")
    on_end = _each("on_end")
