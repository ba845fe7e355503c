"""What ordinary decoders share: every layer is attention followed by an MLP. A family module says what differs.

Config files leave out what equals their type's default, so the spec is made of the values that transformers itself
would build the model with; only the sizes must be in the file.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, WeightNames, require
from nemotron_dspark.targets.state import TargetState

NAMES = WeightNames(
    layers="model.layers",
    final_norm="model.norm",
    embedding="model.embed_tokens",
    head="lm_head",
    embedding_tensors=("model.embed_tokens.weight",),
    head_tensors=("lm_head.weight",),
)


def decoder_spec(
    config: Mapping[str, Any], name: str, mlp: Literal["gated", "plain", "moe"] = "gated", assumed: tuple[str, ...] = ()
) -> TargetSpec:
    """Spec of a decoder whose layers hold ``mlp``; ``assumed`` goes before what is found to be missing."""
    layers, hidden, heads, vocab, intermediate, positions = (
        int(require(config, key))
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "intermediate_size",
            "max_position_embeddings",
        )
    )
    built = as_built(config, name)
    notes = list(assumed)
    rope = built["rope_parameters"]
    rope = rope.get("full_attention", rope)  # one rope, or one per kind of attention layer
    if config.get("rope_theta") is None and not config.get("rope_parameters"):
        notes.append(f"rope theta {rope['rope_theta']:g}: the config gives none and that is the transformers default.")
    return TargetSpec(
        name=name,
        model_type=config["model_type"],
        layers=(LayerKind.DECODER,) * layers,
        hidden_size=hidden,
        vocab_size=vocab,
        num_attention_heads=heads,
        num_key_value_heads=int(built.get("num_key_value_heads") or heads),
        head_dim=int(built.get("head_dim") or hidden // heads),
        mlp=mlp,
        intermediate_size=None if mlp == "moe" else intermediate,
        norm_eps=float(require(built, "rms_norm_eps", "norm_eps")),
        rope_theta=float(rope["rope_theta"]),
        max_position_embeddings=positions,
        tie_word_embeddings=bool(built["tie_word_embeddings"]),
        names=NAMES,
        logit_softcap=built.get("final_logit_softcapping"),
        assumed=tuple(notes),
    )


def as_built(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All values of ``config``, with transformers' defaults for those it leaves out."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(config["model_type"], **values).to_dict()
    except Exception as error:  # whatever the library's validation raises
        raise InputError(
            f"transformers refuses the config of {name}: {first_line(error)}.",
            "Restore config.json from the checkpoint's repository.",
        ) from None


def nothing_to_prepare(model: Any, spec: TargetSpec) -> None:
    """`Family.prepare` of a model without recurrent layers."""


def one_mask(model: Any, state: TargetState, block: int) -> Tensor:
    """`Family.block_mask` of a model whose layers all see as far as each other."""
    return _argument(model, state.mask(block, model.device, getattr(model.config, "sliding_window", None)))


def mask_by_layer_type(model: Any, state: TargetState, block: int) -> dict[str, Tensor]:
    """`Family.block_mask` of a model whose forward takes one mask for each kind of attention layer."""
    windows = {"full_attention": None, "sliding_attention": getattr(model.config, "sliding_window", None)}
    return {
        kind: _argument(model, state.mask(block, model.device, windows[kind]))
        for kind in sorted(set(model.config.layer_types))
    }


def _argument(model: Any, mask: Tensor) -> Tensor:
    """``mask`` as the model's attention reads it: eager attention adds it to the scores."""
    if model.config._attn_implementation != "eager":
        return mask
    hidden = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, hidden)
