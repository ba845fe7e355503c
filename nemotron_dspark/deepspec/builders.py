"""DeepSpec's second extension point, the draft's config, for any target: from a `TargetSpec`, not from its config.

DeepSpec's own builders copy the target's config and read Qwen3's fields from it; a hybrid's has none of them.
"""

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config

from nemotron_dspark.config import DraftSection
from nemotron_dspark.drafts.config import build_draft_config, build_eagle3_config
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec

TRAINING_ATTENTION = "flex_attention"


def dspark_config(spec: TargetSpec, model_args: Mapping[str, Any]) -> Qwen3Config:
    """The config of DeepSpec's `Qwen3DSparkModel` for ``spec``; ``model_args`` is the config's ``model`` section.

    Beside DeepSpec's keys ``model_args`` may hold ``intermediate_size`` and ``rope_theta``; without them they follow
    from the target as for `nds train`.

    Raises:
        InputError: a key is missing, a value is impossible, or DeepSpec cannot train for this target.
    """
    check_logits(spec)
    alpha, rank = float(_need(model_args, "confidence_head_alpha")), int(_need(model_args, "markov_rank"))
    section = DraftSection(
        num_layers=_need(model_args, "num_draft_layers"),
        block_size=_need(model_args, "block_size"),
        markov_rank=rank,
        markov_head=_need(model_args, "markov_head_type") if rank else "vanilla",
        confidence_head=alpha > 0,
        confidence_with_markov=bool(alpha > 0 and _need(model_args, "confidence_head_with_markov")),
        **_shape(model_args),
    )
    config, _ = build_draft_config(
        spec,
        section,
        mask_token_id=int(_need(model_args, "mask_token_id")),
        num_anchors=int(_need(model_args, "num_anchors")),
    )
    return _qwen3(config.to_json())


def eagle3_config(spec: TargetSpec, model_args: Mapping[str, Any]) -> Qwen3Config:
    """The config of DeepSpec's `Qwen3Eagle3Model` for ``spec``; errors as `dspark_config`."""
    check_logits(spec)
    layers = int(_need(model_args, "draft_num_hidden_layers"))
    if layers != 1:
        raise InputError(f"model.draft_num_hidden_layers is {layers}.", "Set it to 1: only one layer can be decoded.")
    config, _ = build_eagle3_config(
        spec,
        DraftSection(**_shape(model_args)),
        ttt_length=int(_need(model_args, "ttt_length")),
        step_loss_decay=float(_need(model_args, "step_loss_decay")),
    )
    values = config.to_json() | {"target_model_name_or_path": str(_need(model_args, "target_model_name_or_path"))}
    return _qwen3(values)


def check_logits(spec: TargetSpec) -> None:
    """`InputError` for a target whose logits are not just its head's output: DeepSpec's objective takes them so."""
    if spec.logit_multiplier != 1.0 or spec.logit_softcap is not None:
        raise InputError(
            f"{spec.name} scales or caps its logits after the LM head, and DeepSpec's objective does not.",
            "Train with `nds train` without --trainer deepspec.",
        )


def _shape(model_args: Mapping[str, Any]) -> dict[str, Any]:
    taps = [int(tap) for tap in _need(model_args, "target_layer_ids")]
    return {"taps": taps, **{key: model_args.get(key) for key in ("intermediate_size", "rope_theta")}}


def _qwen3(values: dict[str, Any]) -> Qwen3Config:
    del values["dtype"]  # the trainer's precision decides, and save_pretrained writes it
    config = Qwen3Config(**values)
    config._attn_implementation = TRAINING_ATTENTION
    return config


def _need(model_args: Mapping[str, Any], key: str) -> Any:
    if model_args.get(key) is None:
        raise InputError(f"The config's model section has no {key}.", f"Add it, or use --opts model.{key}=….")
    return model_args[key]
