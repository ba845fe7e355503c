"""Train on a rolling cache in several processes that meet over gloo; `run_all` tells what came of each.

To be run in a process of its own, as `tests.training.several_ranks`.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from nemotron_dspark.distributed import init_distributed
from nemotron_dspark.targets import Target
from nemotron_dspark.training.callbacks import Callback
from tests.training.runs import train_run
from tests.training.several_ranks import start
from tests.training.test_without_cache import ROLLING, config

SETTINGS = (*ROLLING, "train.validation=0.2", "train.local_batch_size=2", "train.global_batch_size=4")


class Disk(Callback):
    """Prints the most bytes of hidden states that were there at any time."""

    def __init__(self, folder: Path):
        self._folder, self._most = folder, 0

    def on_micro_batch(self, step, done):
        self.on_status("")

    def on_status(self, text):
        found = 0
        with contextlib.suppress(FileNotFoundError):  # a segment goes while it is counted
            for path in self._folder.rglob("shard*"):
                found += path.stat().st_size
        self._most = max(self._most, found)

    def on_end(self):
        print(self._most)


def at_forward(rank: int, number: int, act: Callable[[object], None]) -> Callable[[], None]:
    """Lets ``act`` have what the target computes in that forward of that rank."""

    def arrange() -> None:
        calls, capture = [], Target.capture

        def counted(self, *given):
            calls.append(given)
            found = capture(self, *given)
            if (int(os.environ["RANK"]), len(calls)) == (rank, number):
                act(found)
            return found

        Target.capture = counted

    return arrange


def killed(found: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def not_finite(found) -> None:
    found.last[0, 0] = float("nan")


def run_all(folder: Path, target: str, data: str) -> dict[str, list[list[dict]]]:
    """Every way, in a folder of its own."""

    def trained(name: str, size: int, arrange: Callable[[], None] = lambda: None) -> list[dict]:
        def work() -> None:
            arrange()
            run = folder / name / "run"
            with init_distributed() as together:
                disk = [Disk(run / "segments")] if together.is_main else []
                train_run(target, None, run, config(*SETTINGS), conversations=data, callbacks=disk, context=together)

        return start(size, work, folder / name)

    return {
        "one": [trained("one", 1)],
        "two": [trained("two", 2)],
        "two, killed, two": [trained("two, killed, two", 2, at_forward(1, 3, killed)), trained("two, killed, two", 2)],
        "two, not finite": [trained("two, not finite", 2, at_forward(1, 2, not_finite))],
    }
