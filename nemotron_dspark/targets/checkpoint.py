"""A target's files: found once by the name people give it, a local folder, an alias or a hub id.

The config is read once, and there is one answer to whether code that comes with the files may run.
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.config.known import ALIASES, KNOWN
from nemotron_dspark.errors import EnvironmentFault, InputError, first_line
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.families import general, needs_remote_code, spec_from_config
from nemotron_dspark.targets.spec import TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Everything but the weights and the code.
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README.md")
_WEIGHT_FILES = ("*.safetensors",)
_CODE_FILES = ("*.py",)  # stay on the hub unless remote code is allowed
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that holds at least a ``config.json``."""

    name: str  # as people call it: a hub id, an alias or the folder itself
    folder: Path
    config: dict[str, Any]  # its config.json
    remote_code: bool  # code in the folder builds the model, and may run

    @staticmethod
    def find(
        name: str | Path, *, revision: str | None = None, weights: bool = False, trust_remote_code: bool = False
    ) -> "Checkpoint":
        """The checkpoint called ``name``; its safetensors are downloaded too when ``weights`` is set.

        A type that transformers knows is built by transformers, whatever code comes with it and may run.

        Raises:
            InputError: no such folder, repository or revision, no access to it, or no config in it.
            EnvironmentFault: the hub cannot be reached and the files are not in the local cache.
        """
        folder = _locate(str(name), revision, weights, trust_remote_code)
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise InputError(f"{folder / 'config.json'} is not a JSON object.", "Restore it from the checkpoint.")
        return Checkpoint(str(name), folder, config, trust_remote_code and needs_remote_code(config))

    @staticmethod
    def of(config: TargetConfig, *, weights: bool = False) -> "Checkpoint":
        """The checkpoint that the ``target`` section of a configuration names."""
        return Checkpoint.find(
            config.named, revision=config.revision, weights=weights, trust_remote_code=config.trust_remote_code
        )

    def read_spec(self) -> TargetSpec:
        """The target's spec; `InputError` when its type is not supported or its config is impossible."""
        if self.remote_code:
            return general.remote_spec(self.folder, self.name)
        return spec_from_config(self.config, self.name)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The target's tokenizer; `InputError` when none in the folder can be loaded."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.remote_code)
        except Exception as error:  # tokenizers raises bare ones, and code that comes with a checkpoint may raise any
            raise InputError(
                f"{self.folder} has no tokenizer that can be loaded: {first_line(error)}.",
                "Restore the tokenizer's files from the checkpoint's repository.",
            ) from None
        return cast("PreTrainedTokenizerBase", found)  # never None, whatever its type says


def _locate(name: str, revision: str | None, weights: bool, code: bool) -> Path:
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
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        what = f"{repository} is gated and this machine's hub token has no access to it."
        do = f"Accept the licence at https://huggingface.co/{repository} and log in with `hf auth login`."
    except errors.RepositoryNotFoundError:
        what = f"There is no folder {repository}, and the hub has no such model, or it is private."
        do = f"{_suggestion(repository)} For a private one log in with `hf auth login`."
    except errors.RevisionNotFoundError:
        what, do = f"{repository} has no revision {revision}.", "Give a branch, a tag or a commit of it."
    except errors.HFValidationError as error:
        what, do = f"{repository!r} is not a hub id: {error}.", _suggestion(repository)
    except OSError as error:  # no connection, offline mode, a server error, a full disk: all derive from OSError
        at = f" at revision {revision}" if revision else ""
        raise EnvironmentFault(
            f"{repository}{at} is no folder here, is not in the local hub cache, and could not be downloaded "
            f"({first_line(error)}).",
            f"{_near_miss(repository)} Check the connection and HF_HUB_OFFLINE, or give a local folder.".strip(),
        ) from error
    raise InputError(what, do)


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
    keys = {(full if owner else full.rpartition("/")[2]).lower(): full for full in full_names}
    close = difflib.get_close_matches(f"{owner}/{last}" if owner else last, keys, n=1, cutoff=0.75)
    return f"Did you mean {keys[close[0]]}?" if close else ""


def _words(name: str) -> set[str]:
    """The parts of a repository's name, without the owner and the maker's name."""
    return set(re.split(r"[-_ ]", name.rpartition("/")[2].lower())) - {"nvidia", ""}


def _suggestion(name: str) -> str:
    generic = "Give a folder that exists or a hub id such as nvidia/Nemotron-H-8B; `nds inspect --list` names more."
    return _near_miss(name) or generic
