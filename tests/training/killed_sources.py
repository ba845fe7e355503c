"""Start the same run of `train_run` on conversations several times and kill -9 each at a random moment.

A program of its own: it imports torch once and forks, which is only safe while it has run no forward itself. Prints the
newest checkpoint after each kill.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from nemotron_dspark.config import RunConfig
from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.loop import Watcher
from nemotron_dspark.training.run import train_run


class Count(Watcher):
    """One byte into a pipe for all that goes on: forwards of the draft, batches of a window."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def forward(self, step: int, done: int) -> None:
        os.write(self._descriptor, b".")

    def working(self, text: str) -> None:
        if "tokenising" not in text:
            os.write(self._descriptor, b".")


def killed_run(target: str, data: str, folder: Path, config: RunConfig, moments: int, delay: float) -> None:
    """Train in a child process, and kill it ``delay`` seconds after so many signs of life."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train_run(target, None, folder, config, conversations=Path(data), watcher=Count(send))
        finally:
            os._exit(1)  # reached only when the run ended or failed before the kill
    os.close(send)
    for _ in range(moments):
        os.read(receive, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(receive)
    if not os.WIFSIGNALED(status):
        sys.exit("the run was over before it was killed")


def main() -> None:
    target, data, folder, settings, kills = sys.argv[1:]
    torch.set_num_threads(1)
    for slow in (
        "torch._dynamo",
        "torch.utils.tensorboard",
        "transformers.models.nemotron_h.modeling_nemotron_h",
    ):  # imported once, not in every child
        with contextlib.suppress(ImportError):
            importlib.import_module(slow)
    config = RunConfig.model_validate_json(settings)
    chance, reached = random.Random(3), []
    for _ in range(int(kills)):
        killed_run(target, data, Path(folder), config, chance.randint(3, 12), chance.uniform(0, 0.02))
        names = [path.name for path in list_checkpoints(Path(folder) / "checkpoints")]
        reached.append(int(names[-1].removeprefix("step-")) if names else 0)
    print(json.dumps(reached))


if __name__ == "__main__":
    main()
