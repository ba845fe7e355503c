"""Processes that die by kill -9 at chosen moments, cheaply: all are forks of one that has the libraries imported.

A moment is a call that changes the disk (the process kills itself right before or right after it), or an amount of
processor time after which the process is killed from outside, wherever it is.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

DISK_CALLS = ("pwrite", "fsync", "ftruncate", "replace", "rename", "unlink", "rmdir", "mkdir")
LONGEST = 300  # seconds
PRELOAD = (
    "tests.kill9",
    "tests.conftest",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.models.nemotron_h.modeling_nemotron_h",
    "nemotron_dspark.training.run",
)


def prepared_forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    forkserver.ensure_running()  # with these, whoever asks for others later
    return context


def apart(function: Callable, *arguments: Any) -> Any:
    """Result of ``function(*arguments)`` in a process of its own, which may fork: no other thread runs in it."""
    context = prepared_forkserver()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, function, arguments))
    process.start()
    send.close()
    result, failure = None, "it died"
    if receive.poll(LONGEST):
        with contextlib.suppress(EOFError):
            result, failure = receive.recv()
    else:
        process.kill()
        failure = f"it said nothing for {LONGEST} seconds"
    process.join()
    assert failure is None, failure
    return result


def _answer(send: Any, function: Callable, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        send.send((function(*arguments), None))
    except BaseException:
        send.send((None, traceback.format_exc()))


class Child:
    """A fork that runs ``action``; `end` tells how it ended."""

    def __init__(self, action: Callable[[], Any], *, at: int | None = None, after: bool = False):
        """Dies at its disk call number ``at``, before it or ``after`` it."""
        self._receive, send = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(send)
            return
        status, numbers = 1, itertools.count(1)
        try:
            _number_disk_calls(numbers, at, after)
            action()
            os.write(send, str(next(numbers) - 1).encode())
            status = 0
        except BaseException:
            os.write(send, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(status)

    def kill_after(self, seconds: float) -> None:
        """Kill it when it has used so much processor time, if it lives that long."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            while self._alive() and _processor_seconds(self.pid) < seconds:
                time.sleep(0.001)
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> tuple[bool, int, float]:
        """Whether it was killed, its disk calls if it was not, and the processor time it took."""
        _, status, usage = os.wait4(self.pid, 0)
        said = os.read(self._receive, 4000).decode()
        os.close(self._receive)
        seconds = usage.ru_utime + usage.ru_stime
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True, 0, seconds
        assert os.WEXITSTATUS(status) == 0, said
        return False, int(said), seconds

    def _alive(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill_often(
    action: Callable[[Path], Any],
    folder: Path,
    kills: int,
    *,
    seed: int = 0,
    look: Callable[[Path], Any] = lambda folder: None,
) -> tuple[list[Path], list[Any]]:
    """Run ``action`` in folders below ``folder``, each killed again and again until it comes through, ``kills`` in all.

    Every second kill falls on a disk call, the others anywhere. Returns the folders, the first of which was never
    disturbed, and what ``look`` saw after each kill.
    """
    chance, folders, seen = random.Random(seed), [folder / "undisturbed"], []
    _, calls, seconds = Child(lambda: action(folders[0])).end()
    folders.append(folder / "killed1")
    while len(seen) < kills:
        if len(seen) % 2:
            child = Child(
                lambda: action(folders[-1]),
                at=chance.randint(1, calls // 2),
                after=chance.random() < 0.5,
            )
        else:
            child = Child(lambda: action(folders[-1]))
            child.kill_after(chance.uniform(0, seconds))
        killed, *_ = child.end()
        if killed:
            seen.append(look(folders[-1]))
        else:
            folders.append(folder / f"killed{len(folders)}")
    Child(lambda: action(folders[-1])).end()
    return folders, seen


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _number_disk_calls(numbers: Iterator[int], at: int | None, after: bool) -> None:
    def numbered(real: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            number = next(numbers)
            if number == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*given, **named)
            finally:
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in DISK_CALLS:
        setattr(os, name, numbered(getattr(os, name)))


def _processor_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
