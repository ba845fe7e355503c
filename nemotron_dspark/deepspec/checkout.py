"""A DeepSpec checkout: where it is, whether it is the commit the bridge was made for, and how to get it.

DeepSpec is a repository, not a package: it is used by being on Python's path. Nothing here changes a file of it.
"""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from nemotron_dspark.errors import EnvironmentFault, InputError, first_line

COMMIT = "afdfa7c9382a3341a3e6f17756dd816da79f132c"
URL = "https://github.com/deepseek-ai/DeepSpec.git"
HOME_VARIABLE = "DEEPSPEC_HOME"
URL_VARIABLE = "DEEPSPEC_URL"
_HOW = f"Run `nds deepspec install`, or set {HOME_VARIABLE} to a checkout of {URL.removesuffix('.git')}."


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A folder that holds DeepSpec."""

    folder: Path
    commit: str | None  # None: no git repository, so nobody knows
    changed: tuple[str, ...]  # tracked files that differ from the commit

    def to_json(self) -> dict[str, str | None]:
        return {"folder": str(self.folder), "commit": self.commit}

    def warnings(self) -> tuple[str, ...]:
        """What is unusual about it, one sentence each; none of it stops anything."""
        found = []
        if self.commit is None:
            found.append(f"{self.folder} is no git repository: which commit of DeepSpec it holds is unknown.")
        elif self.commit != COMMIT:
            found.append(f"{self.folder} is at commit {self.commit[:7]}; the bridge was made for {COMMIT[:7]}.")
        if self.changed:
            more = f" and {len(self.changed) - 1} more" if len(self.changed) > 1 else ""
            found.append(f"{self.folder} has local changes: {self.changed[0]}{more}.")
        return tuple(found)


def install_folder() -> Path:
    """Where `install` puts the pinned commit: in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "nemotron-dspark" / f"DeepSpec-{COMMIT[:7]}"


def find(folder: Path | None = None) -> Checkout:
    """The checkout in ``folder``, else in DEEPSPEC_HOME, else the installed one.

    Raises:
        InputError: ``folder`` or DEEPSPEC_HOME names something else.
        EnvironmentFault: there is no checkout.
    """
    given = folder or os.environ.get(HOME_VARIABLE)
    home = Path(given).expanduser().absolute() if given else install_folder()
    if not (home / "deepspec" / "__init__.py").is_file() or not (home / "train.py").is_file():
        if given:
            raise InputError(f"{home} is not a DeepSpec checkout: it has no train.py and deepspec/.", _HOW)
        raise EnvironmentFault("There is no DeepSpec checkout.", _HOW)
    commit = _git(home, "rev-parse", "HEAD") if (home / ".git").exists() else None
    status = _git(home, "status", "--porcelain", "--untracked-files=no") if commit else None
    changed = tuple(line[2:].strip() for line in (status or "").splitlines())
    return Checkout(home, commit, changed)


def install(folder: Path | None = None, *, url: str | None = None, commit: str = COMMIT) -> Checkout:
    """Clone DeepSpec at ``commit`` into ``folder`` (the user's cache), or check the clone that is there.

    ``url`` defaults to DEEPSPEC_URL, else to the public repository. A clone appears whole or not at all.

    Raises:
        EnvironmentFault: git is missing, or the repository cannot be reached or has no such commit.
        InputError: ``folder`` holds something else, or another commit.
    """
    folder = (folder or install_folder()).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = find(folder)
        if found.commit != commit:
            raise InputError(
                f"{folder} holds commit {(found.commit or 'unknown')[:7]}, not {commit[:7]}.",
                "Delete the folder or give another one to --folder.",
            )
        return found
    if shutil.which("git") is None:
        raise EnvironmentFault("git is not installed.", "Install it, then run the same command again.")
    source = url or os.environ.get(URL_VARIABLE) or URL
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        clone = ("clone", "--quiet", "--no-checkout", source, str(partial))
        _git(Path.cwd(), *clone, failed=f"{source} cannot be cloned")
        _git(partial, "checkout", "--quiet", "--detach", commit, failed=f"{source} has no commit {commit[:7]}")
        found = _git(partial, "rev-parse", "HEAD")
        if found != commit:
            raise EnvironmentFault(f"The clone is at {found}, not at {commit}.", "Name another mirror with --url.")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return find(folder)


def put_on_path(checkout: Checkout) -> None:
    """Make ``import deepspec`` find ``checkout``."""
    if str(checkout.folder) not in sys.path:
        sys.path.insert(0, str(checkout.folder))


def deepspec_module(name: str) -> ModuleType:
    """A module of DeepSpec, which must be on Python's path.

    Raises:
        EnvironmentFault: it is not, or a package it needs is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "deepspec":
            raise EnvironmentFault(
                "DeepSpec is not on Python's path.",
                f"{_HOW} `nds deepspec train` then sets the path; by hand it is PYTHONPATH=${HOME_VARIABLE}.",
            ) from None
        raise EnvironmentFault(
            f"DeepSpec needs the package {error.name}, which is not installed.",
            f"`pip install {error.name}`; `nds deepspec check` lists everything that is missing.",
        ) from None
    except ImportError as error:
        raise EnvironmentFault(
            f"DeepSpec cannot be imported: {first_line(error)}.", "`nds deepspec check` compares the versions."
        ) from None


def _git(folder: Path, *arguments: str, failed: str | None = None) -> str | None:
    """Output of a git command in ``folder``, run without a terminal.

    Where git refuses: `EnvironmentFault` that begins with ``failed``, None without it or without git.
    """
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        return None
    if done.returncode and failed:
        reason = (done.stderr.strip().splitlines() or ["git gave no reason"])[-1].rstrip(".")
        do = f"Check the connection, or name a mirror with --url or {URL_VARIABLE}."
        raise EnvironmentFault(f"{failed} ({reason}).", do)
    return None if done.returncode else done.stdout.rstrip("\n")
