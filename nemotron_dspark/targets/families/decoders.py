"""Ordinary decoders: every layer is attention followed by an MLP; the table below says what else is special about each.

Config files leave out what equals their type's default, so the spec is made of the values that transformers itself
would build the model with; only the sizes must be in the file.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.targets.families.family import Family, mask_by_layer_type
from nemotron_dspark.targets.spec import DECODER_NAMES, LayerKind, TargetSpec, require


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
        names=DECODER_NAMES,
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


def qwen3_moe_spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    """Experts in every layer, or in some, the others being gated MLPs."""
    everywhere = not config.get("mlp_only_layers") and int(config.get("decoder_sparse_step", 1)) == 1
    return decoder_spec(config, name, mlp="moe" if everywhere else "gated")


def gemma3_spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    """The rope theta is that of the layers that see everything; those with a window have another."""
    rope = as_built(config, name)["rope_parameters"]
    wide, near = (rope[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))
    note = f"rope theta {wide:g}: of the layers that see everything; those with a window use {near:g}."
    return decoder_spec(config, name, assumed=(note,))


FAMILIES = {
    "llama": Family(decoder_spec),
    # Where the config gives a window, every layer sees only that far.
    "mistral": Family(decoder_spec),
    # LayerNorm with 1 + weight, rope on half of each head: the draft, a Qwen3 of the same sizes, has neither.
    "nemotron": Family(functools.partial(decoder_spec, mlp="plain")),
    # With `use_sliding_window` the later layers see only a window.
    "qwen3": Family(decoder_spec, block_mask=mask_by_layer_type),
    "qwen3_moe": Family(qwen3_moe_spec),
    # Soft caps on the scores need eager attention: transformers 5.15 would run SDPA, which leaves them out, in silence.
    "gemma2": Family(decoder_spec, block_mask=mask_by_layer_type, attention="eager"),
    "gemma3_text": Family(gemma3_spec, block_mask=mask_by_layer_type),
    # An attention sink per head, which SDPA does not have.
    "gpt_oss": Family(functools.partial(decoder_spec, mlp="moe"), block_mask=mask_by_layer_type, attention="eager"),
}
