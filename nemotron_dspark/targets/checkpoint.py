"""A target's files: found once, the config read once, and one answer to whether code that comes with them may run."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nemotron_dspark.config import TargetConfig
from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.files import read_json
from nemotron_dspark.targets.families import general, needs_remote_code, spec_from_config
from nemotron_dspark.targets.locate import locate
from nemotron_dspark.targets.spec import TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        folder = locate(str(name), revision=revision, weights=weights, code=trust_remote_code)
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
