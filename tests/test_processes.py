"""Errors of a pool's processes are raised here, and none outlives its parent."""

import multiprocessing
import os
import signal
import time

import pytest

from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.processes import deaths_named, process_pool, share


def answer(number):
    if number == 0:
        raise InputError("Zero was sent.", "Send another number.")
    if number < 0:
        os.kill(os.getpid(), -number)
    return share() / number if number != 1 else 1 // 0


def test_an_error_of_a_process_is_raised_by_its_future():
    with process_pool(1, 6) as pool:
        assert pool.submit(answer, 3).result() == 2
        with pytest.raises(InputError, match=r"Zero was sent\. Send another number\.") as caught:
            pool.submit(answer, 0).result()
        assert (caught.value.what, caught.value.do) == ("Zero was sent.", "Send another number.")
        with pytest.raises(ZeroDivisionError):
            pool.submit(answer, 1).result()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_is_killed_is_an_error_that_says_what_it_did(workers):
    with process_pool(workers, 6) as pool:
        assert pool.submit(answer, 3).result() == 2
        dying = pool.submit(answer, -signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match="process that divides was killed"), deaths_named("divides"):
            dying.result()


def parent(ours):
    pool = process_pool(1)
    ours.send(pool.submit(os.getpid).result())
    pool.submit(time.sleep, 600)
    time.sleep(600)


def test_a_process_ends_when_its_parent_is_killed():
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
