"""Processes that work for this one: started fresh, spoken to over a pipe, and never left behind.

An error in a child is raised where its messages are received. A child ends when its parent does, however that ended.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

from nemotron_dspark.errors import EnvironmentFault, NdsError

START = multiprocessing.get_context("spawn")  # a fork would inherit locks that threads hold, and CUDA's state
_GRACE = 5.0  # seconds to end by itself


class Child:
    """A process that runs ``work(pipe, *arguments)``; use as a context manager. All of that must be picklable.

    ``work`` needs no care for the end: to read from, or write to, a pipe that the parent has closed ends it.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: Any):
        self._name = name
        self._pipe, theirs = START.Pipe()
        self._process = START.Process(target=_run, args=(work, theirs, arguments), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: Any) -> None:
        """Raises what `receive` raises when the child has ended."""
        try:
            self._pipe.send(message)
        except OSError:
            while True:  # its error comes behind the messages it sent before
                self.receive()

    def receive(self) -> Any:
        """The child's next message.

        Raises:
            NdsError: the child raised it, or it died.
            RuntimeError: it failed in another way; its traceback is the message.
        """
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, _Failure):
            raise message.kind(*message.arguments)
        return message

    def kill(self) -> None:
        """End the process at once; whoever receives is told."""
        self._process.kill()

    def close(self) -> None:
        """End the process; it is asked first, by closing its pipe."""
        self._pipe.close()
        self._process.join(_GRACE)
        self._process.kill()
        self._process.join()

    def _died(self) -> EnvironmentFault:
        self._process.join(_GRACE)
        code = self._process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return EnvironmentFault(
            f"The process {self._name} ended {how}.",
            "Everything written before is kept, the same command goes on; if memory was short, use fewer processes.",
        )


class _Failure:
    """What a child raised."""

    def __init__(self, error: Exception):
        known = isinstance(error, NdsError)
        self.kind = type(error) if known else RuntimeError
        self.arguments = (error.what, error.do) if known else ("".join(traceback.format_exception(error)),)


def _run(work: Callable[..., None], pipe: Connection, arguments: tuple) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all its processes: the parent decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(pipe, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(_Failure(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
