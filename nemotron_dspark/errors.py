"""Errors that a person reads: one sentence on what is wrong, one on what to do.

The exit code tells a script which side the fault is on: 1 a check failed, 2 the user's input, 3 the environment.
"""


class NdsError(Exception):
    """Base of every error that `nds` reports without a traceback."""

    exit_code = 1

    def __init__(self, what: str, do: str):
        super().__init__(what, do)  # as they were given: a process pool hands errors over pickled
        self.what = what
        self.do = do

    def __str__(self) -> str:
        return f"{self.what} {self.do}"


class CheckError(NdsError):
    """A proof or a check came out false; the work was stopped before it could be wasted."""

    exit_code = 1


class InputError(NdsError):
    """What the user gave cannot be used: a path, a file, a key, a value."""

    exit_code = 2


class EnvironmentFault(NdsError):
    """The machine cannot do it: a full disk, a port in use, a missing package or device."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, without its full stop, to be quoted in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
