"""Children are heard, their errors are raised here, and none outlives its parent."""

import multiprocessing
import os
import signal
import time

import pytest

from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.processes import Child


def answer(pipe, factor):
    while True:
        number = pipe.recv()
        if number == 0:
            raise InputError("Zero was sent.", "Send another number.")
        if number < 0:
            os.kill(os.getpid(), -number)
        pipe.send(factor / number if number != 1 else 1 // 0)


def test_an_error_of_a_child_is_raised_where_it_is_received():
    with Child("that divides", answer, 6) as child:
        child.send(3)
        assert child.receive() == 2
        child.send(0)
        with pytest.raises(InputError, match="Zero was sent"):
            child.receive()
    with Child("that divides", answer, 6) as child:
        child.send(1)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            child.receive()


def test_a_child_that_dies_is_an_error_that_says_how():
    with Child("that divides", answer, 6) as child:
        child.send(-signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match="that divides ended by SIGKILL"):
            child.receive()
        with pytest.raises(EnvironmentFault, match="that divides ended by SIGKILL"):
            child.send(3)


def idle(pipe):
    pipe.send(os.getpid())
    time.sleep(600)


def parent(ours):
    child = Child("that idles", idle)
    ours.send(child.receive())
    time.sleep(600)


def test_a_child_ends_when_its_parent_is_killed():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=parent, args=(theirs,))
    process.start()
    theirs.close()
    child = ours.recv()
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    """Whether any of its threads is; nobody may have waited for an orphan."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except FileNotFoundError:
        return False
