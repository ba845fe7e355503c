"""Start an engine in place of this process, when it is installed and new enough and its port is free."""

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NoReturn

from nemotron_dspark import files
from nemotron_dspark.engines.commands import EngineCommand, engine_table, version_key
from nemotron_dspark.errors import EnvironmentFault, InputError

_VERSION = re.compile(r"\d+(?:\.\d+)+(?:rc\d+)?|(?<=version: )\d+")
_VERSION_SECONDS = 300  # the first import of an engine is slow


def run(command: EngineCommand, *, host: str, port: int, folder: Path = Path()) -> NoReturn:
    """Become the engine; its extra files are written to ``folder``.

    Raises:
        EnvironmentFault: it is not installed or too old, or the port is in use.
        InputError: what the engine reads has not been exported, or a file of another content is in the way.
    """
    program = installed(command)
    check_version(command)
    check_port(host, port)
    _check_exported(command)
    for name, text in command.files.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise InputError(f"{path} is there already and says something else.", "Move it, or run in another folder.")
        files.write_whole(path, lambda file, text=text: file.write(text.encode()))
    os.execve(program, [program, *command.argv[1:]], os.environ | dict(command.environment))


def installed(command: EngineCommand) -> str:
    """Path of the engine's program; `EnvironmentFault` where there is none."""
    program = shutil.which(command.argv[0])
    if program is None:
        raise EnvironmentFault(
            f"{command.title} is not installed here: there is no {command.argv[0]}.",
            engine_table(command.engine).install,
        )
    return program


def check_version(command: EngineCommand) -> None:
    """`EnvironmentFault` when the installed version cannot be told or is older than the pair needs."""
    table = engine_table(command.engine)
    try:
        done = subprocess.run(table.version, capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False)
        said = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
        done = None
    if table.shows is not None:
        if table.shows not in said:
            raise EnvironmentFault(
                f"The {command.title} that is installed here does not know {table.shows}.",
                f"Update it: {command.minimum} or newer does.",
            )
        return
    found = _VERSION.search(said)
    if done is None or done.returncode or found is None:
        raise EnvironmentFault(f"{command.title} does not tell its version: it is not installed here.", table.install)
    version = found.group()
    if version_key(version) < version_key(command.minimum):
        raise EnvironmentFault(
            f"{command.title} {version} is installed, and this pair needs {command.minimum} or newer.",
            "Update it in its own environment.",
        )


def check_port(host: str, port: int) -> None:
    """`EnvironmentFault` when something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentFault(
                f"Port {port} on {host} cannot be used: {error.strerror}.", "Choose another port with --port."
            ) from None


def _check_exported(command: EngineCommand) -> None:
    for line in command.prepare:
        path = Path(shlex.split(line)[-1])  # --out
        if not path.exists():
            raise InputError(f"{path} is not there.", f"Run first: {line}")
