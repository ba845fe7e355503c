"""What the demo and a recipe tell while they run; a command overrides what it shows."""

from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.schedule import SampleSchedule


class Progress:
    """Told of stages by name, of what is worth a line, and of how far the running stage is."""

    def stage(self, name: str) -> None: ...
    def note(self, text: str) -> None: ...
    def update(self, text: str, done: float, total: float) -> None: ...


class StepProgress(Callback):
    """Training steps as progress."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._text = "training"

    def on_begin(self, schedule: SampleSchedule, first_step: int) -> None:
        self._total = schedule.total_steps

    def on_micro_batch(self, step: int, done: int) -> None:
        self._progress.update(self._text, step + 1, self._total)

    def on_metrics(self, metrics: StepMetrics) -> None:
        expected = "" if metrics.tau is None else f", tau {metrics.tau:.2f}"  # unknown without the target's logits
        self._text = f"loss {metrics.loss:.3f}{expected}"
