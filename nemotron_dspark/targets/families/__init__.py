"""The families of targets by ``model_type``: a new one is a row here. Types without one take the general path."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.families import decoders, general, hybrids
from nemotron_dspark.targets.families.config import ConfigFile
from nemotron_dspark.targets.families.family import Family
from nemotron_dspark.targets.spec import TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: dict[str, Family] = hybrids.FAMILIES | decoders.FAMILIES

REMOTE = {  # known, and why only the checkpoint's own code builds it
    "nemotron-nas": "every layer has its own shape (block_configs)",
}


def spec_from_config(config: "Mapping[str, Any] | PreTrainedConfig", name: str = "") -> TargetSpec:
    """Spec of a `transformers` config object or of a parsed ``config.json``.

    Raises:
        InputError: the type is not supported, or a field that its family needs is missing or impossible.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    family = _family_of(values)
    file = ConfigFile(values, name or str(values.get("_name_or_path") or "target"))
    spec = family.spec(file)
    return dataclasses.replace(spec, assumed=(*spec.assumed, *file.assumed))


def family_for(spec: TargetSpec) -> Family:
    """The family of a target: the general path for a type without one of its own."""
    return FAMILIES.get(spec.model_type, general.FAMILY)


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """True when neither this project nor transformers has the model's code and the checkpoint brings it."""
    model_type = config.get("model_type")
    known = model_type in FAMILIES or _in_transformers(model_type)
    return model_type in REMOTE or (not known and "AutoModelForCausalLM" in (config.get("auto_map") or {}))


def _in_transformers(model_type: Any) -> bool:
    """True when transformers has a causal language model for the type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in REMOTE


def _family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config; `InputError` when nothing here or in transformers builds its model."""
    model_type = config.get("model_type")
    if model_type in FAMILIES or _in_transformers(model_type):
        return FAMILIES.get(str(model_type), general.FAMILY)
    if model_type is None:
        raise InputError("The target's config.json has no model_type.", "Restore it from the checkpoint's repository.")
    if needs_remote_code(config):
        why = REMOTE.get(str(model_type), "transformers does not know this type")
        raise InputError(
            f"A target of type {model_type!r} is built by code that comes with its checkpoint: {why}.",
            "Read that code, then allow it with --trust-remote-code; or choose another target.",
        )
    close = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f" The nearest known one is {close[0]}." if close else ""
    raise InputError(
        f"Targets of type {model_type!r} are not supported.{hint}",
        f"Types with a family of their own: {', '.join(sorted(FAMILIES))}; others must be known to transformers.",
    )
