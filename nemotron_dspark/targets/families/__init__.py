"""One small module per family, found by ``model_type``: a new one is a file and a line here. Others are `general`."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.families import (
    bamba,
    falcon_h1,
    gemma2,
    gemma3_text,
    general,
    gpt_oss,
    granitemoehybrid,
    jamba,
    lfm2,
    llama,
    mistral,
    nemotron,
    nemotron_h,
    qwen3,
    qwen3_moe,
    qwen3_next,
    zamba2,
)
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.state import Recurrent, TargetState

NewRecurrent = Callable[[torch.device, torch.dtype], Recurrent]  # the states of one row before any token


class Family(Protocol):
    """What a family module provides. Where SDPA would be wrong, also ``ATTENTION``: the implementation to load."""

    @staticmethod
    def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
        """Spec from a parsed ``config.json``."""
        ...

    @staticmethod
    def prepare(model: Any, spec: TargetSpec) -> NewRecurrent | None:
        """Make a loaded model ready for `TargetState`; how to make the recurrent states, None without such layers."""
        ...

    @staticmethod
    def block_mask(model: Any, state: TargetState, block: int) -> Any:
        """The model's ``attention_mask`` argument for the next ``block`` tokens behind ``state``."""
        ...


FAMILIES: dict[str, Any] = {
    "nemotron_h": nemotron_h,
    "nemotron": nemotron,
    "llama": llama,
    "mistral": mistral,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gpt_oss": gpt_oss,
    "lfm2": lfm2,
    "lfm2_moe": lfm2,
    "granitemoehybrid": granitemoehybrid,
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "zamba2": zamba2,
    "qwen3_next": qwen3_next,
    "qwen3_5_text": qwen3_next,
    "qwen3_5_moe_text": qwen3_next,
    "jamba": jamba,
}

REMOTE = {  # known, and why only the checkpoint's own code builds it
    "nemotron-nas": "every layer has its own shape (block_configs)",
}


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """True when neither this project nor transformers has the model's code and the checkpoint brings it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type in REMOTE:
        return True
    known = model_type in FAMILIES or model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return not known and "AutoModelForCausalLM" in (config.get("auto_map") or {})


def family_of(config: Mapping[str, Any]) -> Family:
    """The family module for a parsed config: `general` for a type that only transformers knows.

    Raises:
        InputError: transformers does not know the type either, or its model is code that comes with the checkpoint.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in REMOTE:
        return general
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
