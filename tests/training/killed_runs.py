"""Start the same training run ten times and kill -9 each at a random moment; prints the newest checkpoint after each.

A program of its own: it imports torch once and forks, which is only safe while it has run no backward itself.
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
from conftest import MemoryCache, new_draft, settings

from nemotron_dspark.training.checkpoints import list_checkpoints
from nemotron_dspark.training.loop import Watcher, train

SETTINGS = {"max_steps": 36, "checkpoint_every": 1, "log_every": 3}


class Count(Watcher):
    """One byte per forward into a pipe."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def forward(self, step: int, done: int) -> None:
        os.write(self._descriptor, b".")


def killed_run(folder: Path, forwards: int, delay: float) -> None:
    """Train in a child process, and kill it ``delay`` seconds after so many forwards."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            cache = MemoryCache()
            train(cache, new_draft(cache=cache), settings(**SETTINGS), folder, watcher=Count(send))
        finally:
            os._exit(1)  # reached only when the run ended or failed before the kill
    os.close(send)
    for _ in range(forwards):
        os.read(receive, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(receive)
    if not os.WIFSIGNALED(status):
        sys.exit("the run was over before it was killed")


def main() -> None:
    torch.set_num_threads(1)
    for slow in ("torch._dynamo", "torch.utils.tensorboard"):  # imported once, not in every child
        with contextlib.suppress(ImportError):
            importlib.import_module(slow)
    folder, chance, reached = Path(sys.argv[1]), random.Random(5), []
    for _ in range(10):
        killed_run(folder, chance.randint(1, 9), chance.uniform(0, 0.03))
        names = [path.name for path in list_checkpoints(folder / "checkpoints")]
        reached.append(int(names[-1].removeprefix("step-")) if names else 0)
    print(json.dumps(reached))


if __name__ == "__main__":
    main()
