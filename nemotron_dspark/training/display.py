"""What a person sees while a draft trains: one live line on a terminal, elsewhere a line for each of the metrics."""

import math
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.metrics import StepMetrics
from nemotron_dspark.training.schedule import SampleSchedule


class Display(Callback):
    """A callback that prints on stderr. A context manager: the live line ends with it."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[dim]{task.fields[beside]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._beside = ""
        self._before: TaskID | None = None  # stands for the steps until they begin
        self._task: TaskID | None = None

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def on_begin(self, schedule: SampleSchedule, first_step: int) -> None:
        self._schedule, self._first, self._started = schedule, first_step, time.monotonic()
        if self._before is not None:
            self._progress.remove_task(self._before)
        total = schedule.total_steps * schedule.accumulation
        self._task = self._progress.add_task(
            "",
            total=total,
            completed=first_step * schedule.accumulation,
            step=self._step(first_step),
            left="…",
            numbers="",
            beside=self._beside,
        )
        if first_step:
            self.on_message(f"Going on from step {first_step} of {schedule.total_steps}.")

    def on_micro_batch(self, step: int, done: int) -> None:
        finished = step * self._schedule.accumulation + done
        here = finished - self._first * self._schedule.accumulation
        remaining = self._schedule.total_steps * self._schedule.accumulation - finished
        left = (time.monotonic() - self._started) / here * remaining
        if self._task is not None:
            self._progress.update(self._task, completed=finished, step=self._step(step), left=_duration(left))

    def on_metrics(self, metrics: StepMetrics) -> None:
        numbers = [f"loss {metrics.loss:.3f}"]
        if metrics.tau is not None:
            numbers.append(f"tau {metrics.tau:.2f}")
        numbers += [f"lr {metrics.lr:.1e}", f"{_count(metrics.tokens_per_second)} tok/s"]
        if self._console.is_terminal and self._task is not None:
            self._progress.update(self._task, numbers="  ".join(numbers))
        else:
            self._console.print(f"step {self._step(metrics.step)}  {'  '.join(numbers)}", soft_wrap=True)

    def on_validation(self, metrics: StepMetrics, best: bool) -> None:
        tau = f"  tau {metrics.tau:.2f}" if metrics.tau is not None else ""
        top1 = f"  top-1 {metrics.top1:.1%}" if metrics.top1 is not None else ""
        mark = "  best so far" if best else ""
        self.on_message(f"held out, step {self._step(metrics.step)}  loss {metrics.loss:.3f}{tau}{top1}{mark}")

    def on_status(self, text: str) -> None:
        self._beside = text
        if self._task is not None:
            self._progress.update(self._task, beside=escape(text))
        elif self._before is not None:
            self._progress.update(self._before, beside=escape(text))
        else:
            self._before = self._progress.add_task("", total=None, step="-", left="…", numbers="", beside=escape(text))

    def on_message(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)

    def _step(self, step: int) -> str:
        return f"{step}/{self._schedule.total_steps}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
