"""Pools of processes that work for this one: started fresh, and never left behind, however this one ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nemotron_dspark.errors import EnvironmentFault

START = multiprocessing.get_context("spawn")  # a fork would inherit locks that threads hold, and CUDA's state


_shared: Any = None  # in a process of a pool: what all its tasks use


def process_pool(workers: int, shared: Any = None) -> ProcessPoolExecutor:
    """A pool whose ``workers`` end when this process does. Each is sent ``shared`` once, and its tasks `share` it.

    An `NdsError` that a task raises is raised by its future.
    """
    # A terminal sends its signals to all processes of a command, and this one decides what they mean. In a pool of
    # several SIGTERM must work: that is how the executor ends the others when one has died.
    ignored = (signal.SIGINT, signal.SIGTERM) if workers == 1 else (signal.SIGINT,)
    return ProcessPoolExecutor(workers, mp_context=START, initializer=_begin, initargs=(ignored, shared))


@contextlib.contextmanager
def deaths_named(work: str) -> Iterator[None]:
    """Turn the death of a pool's process into an `EnvironmentFault` that says what its ``work`` was."""
    try:
        yield
    except BrokenProcessPool:
        raise EnvironmentFault(
            f"A process that {work} was killed.",
            "Everything written before is kept, the same command goes on; if memory was short, use fewer processes.",
        ) from None


def share() -> Any:
    """What the pool was made with, in a task of it."""
    return _shared


def _begin(ignored: tuple[signal.Signals, ...], shared: Any) -> None:
    global _shared
    _shared = shared
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
