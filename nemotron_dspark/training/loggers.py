"""Where a run's metrics go: ``metrics.jsonl`` always, TensorBoard where it is installed, a tracker if asked for."""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_dspark import files
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.training.callbacks import Callback
from nemotron_dspark.training.metrics import FILE, StepMetrics, read_metrics
from nemotron_dspark.training.schedule import SampleSchedule

VALIDATION = "validation/"  # before the names of what is measured on held-out samples
MEASURED = ("loss", "ce", "l1", "confidence", "accept_rate", "tau", "top1")


class MetricsLog(Callback):
    """``metrics.jsonl`` and TensorBoard events in a run's folder."""

    def __init__(self, run_folder: Path):
        self._folder = run_folder
        self._events = run_folder / "tensorboard"
        self._board: Any = None

    def on_begin(self, schedule: SampleSchedule, first_step: int) -> None:
        # The steps after the checkpoint that the run goes on from are done again, and so are their lines.
        kept = [json.dumps(line) for line in read_metrics(self._folder) if line["step"] <= first_step]
        files.write_text(self._folder / FILE, "".join(line + "\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with files.disk_errors(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=first_step + 1)

    def on_metrics(self, metrics: StepMetrics) -> None:
        path = self._folder / FILE
        with files.disk_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")
        self._add_scalars(metrics, "", [field.name for field in dataclasses.fields(metrics)])

    def _add_scalars(self, metrics: StepMetrics, prefix: str, keys: Sequence[str]) -> None:
        if self._board is None:
            return
        with files.disk_errors(self._events):
            for key in keys:
                for name, number in _scalars(key, getattr(metrics, key)):
                    self._board.add_scalar(prefix + name, number, metrics.step)
            self._board.flush()

    def on_validation(self, metrics: StepMetrics, best: bool) -> None:
        self._add_scalars(metrics, VALIDATION, MEASURED)

    def on_end(self) -> None:
        if self._board is not None:
            with files.disk_errors(self._events):
                self._board.close()


class Tracker(Callback):
    """The same metrics in trackio or Weights & Biases, which share these calls; a run that goes on is one run there."""

    def __init__(self, package: str, run_folder: Path, settings: Mapping[str, Any]):
        """`EnvironmentFault` when ``package`` is not installed."""
        try:
            self._package: Any = importlib.import_module(package)
        except ImportError:
            raise EnvironmentFault(
                f"train.tracker is {package}, which is not installed.",
                f"pip install {package}, or leave train.tracker out; metrics.jsonl is written all the same.",
            ) from None
        self._folder, self._settings = run_folder.resolve(), settings
        self._run: Any = None

    def on_begin(self, schedule: SampleSchedule, first_step: int) -> None:
        name = self._folder.name
        given: dict[str, Any] = {"project": "nds", "name": name, "config": dict(self._settings), "resume": "allow"}
        if self._package.__name__ == "wandb":  # which goes on with a run by its id, and writes beside the run
            identity = hashlib.sha256(str(self._folder).encode()).hexdigest()[:12]
            given |= {"id": f"{name}-{identity}", "dir": str(self._folder)}
        self._run = self._package.init(**given)

    def on_metrics(self, metrics: StepMetrics) -> None:
        self._log(metrics, "", [field.name for field in dataclasses.fields(metrics)])

    def on_validation(self, metrics: StepMetrics, best: bool) -> None:
        self._log(metrics, VALIDATION, MEASURED)

    def _log(self, metrics: StepMetrics, prefix: str, keys: Sequence[str]) -> None:
        values = {prefix + name: number for key in keys for name, number in _scalars(key, getattr(metrics, key))}
        self._package.log(values, step=metrics.step)

    def on_end(self) -> None:
        if self._run is not None:
            self._package.finish()


def _scalars(key: str, value: Any) -> list[tuple[str, float]]:
    if value is None or key == "step":
        return []
    if isinstance(value, list):
        return [(f"{key}/{slot}", number) for slot, number in enumerate(value)]
    return [(key, value)]
