"""Folders that a stage writes: each belongs to one job, to one process at a time, and must have room for what comes."""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.files import disk_errors, size_text

_DIGEST = re.compile("[0-9a-f]{32,64}")
_CONTENTS = {  # by the last part of a key, what another digest means
    "cache": "another cache",
    "converted_from": "another cache",
    "conversations": "other conversations",
    "target": "a target with other weights",
    "chat_template": "a target with another chat template",
}


def check_claim(
    folder: Path, what: str, begun_with: Mapping[str, Any] | None, inputs: Mapping[str, Any], ours: Collection[str] = ()
) -> None:
    """`InputError` unless ``folder`` may hold ``what`` (as in "a cache") of ``inputs``.

    ``begun_with`` is what a note in it says that it was begun with: it must be the same, and the first difference is
    named. Without one the folder must be absent or empty; what is called as in ``ours``, and temporary names, which a
    kill may leave, do not count.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file.", "Give an empty or a new folder to --out.")
    if begun_with is None:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not path.name.startswith(".") and path.name not in ours:
                raise InputError(
                    f"{folder} holds other files ({path.name}) and not {what}.",
                    "Give an empty or a new folder to --out.",
                )
        return
    different = first_difference(begun_with, inputs)
    if different is None:
        return
    key, old, new = different
    if _DIGEST.fullmatch(str(old)) and _DIGEST.fullmatch(str(new)):
        raise InputError(
            f"{folder} holds {what} made from {_CONTENTS.get(key.rpartition('.')[2], f'another {key}')}.",
            "Give what that was begun with to go on with it, or give a new folder to --out.",
        )
    key = key.removeprefix("source.")
    raise InputError(
        f"{folder} holds {what} with other settings: {key} was {old!r}, now it is {new!r}.",
        f"Set {key} back to go on with that, or give a new folder to --out.",
    )


def first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> tuple[str, object, object] | None:
    """(key, value before, value now), keys of nested mappings joined by dots."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found = first_difference(old, new, f"{prefix}{key}.")
            if found:
                return found
        elif old != new:
            return f"{prefix}{key}", old, new
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of ``folder``, which is made if it is not there; it ends with the process, however that ends.

    The descriptor that it gives may be left to a child, and then the lock ends with the last of both.

    Raises:
        EnvironmentFault: another process holds it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentFault(
                f"Another process is writing {folder.parent}.", "Wait for it, or choose another folder."
            ) from None
        yield file.fileno()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of ``folder``."""
    if not (folder / "lock").is_file():
        return False
    try:
        with locked(folder):
            return False
    except EnvironmentFault:
        return True


def check_space(folder: Path, missing: int, who: str, advice: str) -> None:
    """`EnvironmentFault` unless ``missing`` bytes fit on the disk of ``folder``; ``who`` is as in "The cache needs"."""
    free = shutil.disk_usage(folder).free
    if free < missing:
        raise EnvironmentFault(f"{who} {size_text(missing)} more, and {folder} has {size_text(free)} free.", advice)
