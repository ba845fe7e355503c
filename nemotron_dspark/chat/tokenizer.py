"""A target's tokenizer without the target."""

from typing import Any

from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.targets.locate import locate


def load_tokenizer(target: str, revision: str | None = None) -> Any:
    """The tokenizer of ``target`` (folder, alias or hub id); no weights are needed.

    Raises:
        InputError: there is no such target, or no tokenizer in it that can be loaded.
        EnvironmentFault: the hub cannot be reached and the files are not in the local cache.
    """
    from transformers import AutoTokenizer

    folder = locate(target, revision=revision)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} has no tokenizer that can be loaded: {first_line(error)}.",
            "Restore the tokenizer's files from the checkpoint's repository.",
        ) from None
