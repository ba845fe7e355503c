"""One small module per family, found by ``model_type``. A new family is one file and one line here."""

import difflib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.families import decoders, nemotron_h
from nemotron_dspark.targets.spec import TargetSpec


class Family(Protocol):
    """What a family module provides."""

    @staticmethod
    def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
        """Spec from a parsed ``config.json``."""
        ...

    @staticmethod
    def prepare(model: Any, spec: TargetSpec) -> dict[int, Any]:
        """Make a loaded model ready for `TargetState`; its Mamba-2 mixers by layer id."""
        ...

    @staticmethod
    def block_mask(mask: Tensor) -> Any:
        """The model's ``attention_mask`` argument for a block mask [B, 1, m, stored]."""
        ...


FAMILIES: dict[str, Any] = {
    "nemotron_h": nemotron_h,
    "llama": decoders,
    "qwen3": decoders,
}

REFUSED = {  # known, and why there is no family
    "nemotron-nas": "every layer has its own shape (block_configs), which only code from its repository builds",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family module for a parsed config; `InputError` when there is none."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type is None:
        raise InputError("The target's config.json has no model_type.", "Restore it from the checkpoint's repository.")
    if model_type in REFUSED:
        raise InputError(
            f"Targets of type {model_type!r} are not supported: {REFUSED[model_type]}.",
            "Choose another target; code from a checkpoint is not run for it.",
        )
    close = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f" The nearest known one is {close[0]}." if close else ""
    raise InputError(
        f"Targets of type {model_type!r} are not supported.{hint}", f"Supported types: {', '.join(sorted(FAMILIES))}."
    )
