"""Ordinary decoders: every layer is attention followed by an MLP; the table below says what is special about each."""

import dataclasses
import functools

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec
from nemotron_dspark.targets.families.family import Family, one_mask
from nemotron_dspark.targets.spec import MLP, LayerKind, TargetSpec, weight_names


def decoder_spec(config: ConfigFile, mlp: MLP = "gated") -> TargetSpec:
    """Spec of a decoder whose layers hold ``mlp``."""
    layers = (LayerKind.DECODER,) * int(config.require("num_hidden_layers"))
    return fill_spec(config, layers=layers, mlp=mlp, logit_softcap=config.get("final_logit_softcapping"))


def qwen3_moe_spec(config: ConfigFile) -> TargetSpec:
    """Experts in every layer, or in some, the others being gated MLPs."""
    everywhere = not config["mlp_only_layers"] and int(config["decoder_sparse_step"]) == 1
    return decoder_spec(config, mlp="moe" if everywhere else "gated")


def gemma3_spec(config: ConfigFile, mlp: MLP = "gated") -> TargetSpec:
    """The rope theta is that of the layers that see everything; those with a window have another."""
    rope = config["rope_parameters"]
    wide, near = (rope[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))
    config.assumed.append(f"rope theta {wide:g}: of the layers that see everything; those with a window use {near:g}.")
    return decoder_spec(config, mlp)


def gemma4_spec(config: ConfigFile) -> TargetSpec:
    """Layers with a window and layers that see everything have heads of their own each; the draft's are the former's.

    The model's own forward takes care of the rest: inputs per layer, later layers that read the keys and values of
    earlier ones, a scalar on every layer's output, experts beside the MLP.
    """
    if config["use_bidirectional_attention"] == "all":
        raise InputError(
            f"{config.name} predicts no next token: it attends in both directions (use_bidirectional_attention all).",
            'Choose a target that generates text: one with null or "vision" there.',
        )
    layers = config.built.per_layer_config
    wide = layers[config["layer_types"].index("full_attention")]
    own = layers[: len(layers) - int(config["num_kv_shared_layers"])]  # the others read the keys of one of these
    config.assumed.append(
        f"heads of {config['head_dim']}, {config['num_key_value_heads']} of keys and values: of the layers with a "
        f"window; those that see everything have heads of {wide.head_dim}, {wide.num_key_value_heads} of them."
    )
    spec = gemma3_spec(config, mlp="moe" if config["enable_moe_block"] else "gated")
    return dataclasses.replace(spec, unequal_keys=sum(layer.num_key_value_heads * layer.head_dim for layer in own))


def gemma4_whole_spec(config: ConfigFile) -> TargetSpec:
    """The language model of the published checkpoints, which read pictures, too."""
    spec = gemma4_spec(config.text_config())
    return dataclasses.replace(spec, model_type=config.stated["model_type"], names=weight_names("model.language_model"))


FAMILIES = {
    "llama": Family(decoder_spec, block_mask=one_mask),
    # Where the config gives a window, every layer sees only that far.
    "mistral": Family(decoder_spec, block_mask=one_mask),
    # LayerNorm with 1 + weight, rope on half of each head: the draft, a Qwen3 of the same sizes, has neither.
    "nemotron": Family(functools.partial(decoder_spec, mlp="plain"), block_mask=one_mask),
    # With `use_sliding_window` the later layers see only a window.
    "qwen3": Family(decoder_spec),
    "qwen3_moe": Family(qwen3_moe_spec, block_mask=one_mask),
    # Soft caps on the scores need eager attention: transformers 5.15 would run SDPA, which leaves them out, in silence.
    "gemma2": Family(decoder_spec, attention="eager"),
    "gemma3_text": Family(gemma3_spec),
    "gemma4_text": Family(gemma4_spec),
    "gemma4": Family(gemma4_whole_spec),
    # An attention sink per head, which SDPA does not have.
    "gpt_oss": Family(functools.partial(decoder_spec, mlp="moe"), attention="eager"),
}
