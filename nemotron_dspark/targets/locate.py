"""From the name a person gives a target to a folder with its config.json: a local folder, an alias or a hub id."""

import difflib
import re
from pathlib import Path

from nemotron_dspark.config.known import ALIASES, KNOWN
from nemotron_dspark.errors import EnvironmentFault, InputError, first_line

# Everything but the weights and the code.
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README.md")
_WEIGHT_FILES = ("*.safetensors",)
_CODE_FILES = ("*.py",)  # stay on the hub unless remote code is allowed
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(name: str, *, revision: str | None = None, weights: bool = False, code: bool = False) -> Path:
    """A local folder that holds the target's config.json.

    Its safetensors come too when ``weights`` is set, its Python files when ``code`` is.

    ``name`` is a folder (returned as it is), an alias, or a hub id, which is downloaded or found in the hub cache.

    Raises:
        InputError: no such folder, repository or revision, or no access to it.
        EnvironmentFault: the hub cannot be reached and the files are not in the local cache.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return _checked(folder, name, weights)
    repository = ALIASES.get(name, name)
    if not _HUB_ID.fullmatch(repository):
        raise InputError(f"There is no folder {name}, and {name!r} is not a hub id.", _suggestion(name))
    return _checked(_download(repository, revision, weights, code), repository, weights)


def _checked(folder: Path, name: str, weights: bool) -> Path:
    if not folder.is_dir():
        raise InputError(f"{name} is a file, not a checkpoint folder.", "Give the folder that holds config.json.")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{name} holds no config.json.", "Give the folder of a checkpoint in the Hugging Face layout, or a hub id."
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no safetensors file.",
            "Download the weights into it; checkpoints in pickle formats (.bin, .pt) are not read.",
        )
    return folder


def _download(repository: str, revision: str | None, weights: bool, code: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    wanted = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ()), *(_CODE_FILES if code else ())]
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        raise InputError(
            f"{repository} is gated and this machine's hub token has no access to it.",
            f"Accept the licence at https://huggingface.co/{repository} and log in with `hf auth login`.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"There is no folder {repository}, and the hub has no such model, or it is private.",
            f"{_suggestion(repository)} For a private one log in with `hf auth login`.",
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{repository} has no revision {revision}.", "Give a branch, a tag or a commit of it."
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{repository!r} is not a hub id: {error}.", _suggestion(repository)) from None
    except OSError as error:  # no connection, offline mode, a server error, a full disk: all derive from OSError
        raise EnvironmentFault(
            f"{repository}{at} is no folder here, is not in the local hub cache, and could not be downloaded "
            f"({first_line(error)}).",
            f"{_near_miss(repository)} Check the connection and HF_HUB_OFFLINE, or give a local folder.".strip(),
        ) from error


def _near_miss(name: str) -> str:
    """``Did you mean …?`` when ``name`` resembles, but is not, a known target; else an empty text."""
    full_names = [known.repository for known in KNOWN] + list(ALIASES)
    if name in full_names:
        return ""
    owner, _, last = name.lower().rpartition("/")
    words = _words(last)
    if owner in ("", "nvidia") and "nemotron" in words and len(words) > 1:
        # a name that leaves words out: the known one with the fewest more, the shortest of those
        fuller = [full for full in full_names if words <= _words(full)]
        if fuller:
            return f"Did you mean {min(fuller, key=lambda full: (len(_words(full) - words), len(full)))}?"
    keys = {(full if owner else full.partition("/")[2]).lower(): full for full in full_names}
    close = difflib.get_close_matches(f"{owner}/{last}" if owner else last, keys, n=1, cutoff=0.75)
    return f"Did you mean {keys[close[0]]}?" if close else ""


def _words(name: str) -> set[str]:
    """The parts of a repository's name, without the owner and the maker's name."""
    return set(re.split(r"[-_ ]", name.rpartition("/")[2].lower())) - {"nvidia", ""}


def _suggestion(name: str) -> str:
    generic = "Give a folder that exists or a hub id such as nvidia/Nemotron-H-8B; `nds inspect --list` names more."
    return _near_miss(name) or generic
