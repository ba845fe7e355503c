"""Families with recurrent layers: what is special about each, and where their mixers lie in a layer of which kind."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import delta, mamba1, mamba2, shortconv
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec, listed_layers
from nemotron_dspark.targets.families.family import Family
from nemotron_dspark.targets.recurrent import NewRecurrent, prepare
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, weight_names

_MAMBA_NAMES = {"mamba": LayerKind.MAMBA2, "linear_attention": LayerKind.MAMBA2}
_NEMOTRON_KINDS = {
    "mamba": LayerKind.MAMBA2,
    "mamba2": LayerKind.MAMBA2,
    "linear_attention": LayerKind.MAMBA2,
    "attention": LayerKind.ATTENTION,
    "full_attention": LayerKind.ATTENTION,
    "mlp": LayerKind.MLP,
    "moe": LayerKind.MOE,
}


def nemotron_h_spec(config: ConfigFile) -> TargetSpec:
    """Every layer is one mixer: Mamba-2, attention without rope, MLP or experts, as the file lists or draws them."""
    pattern = config.require("layers_block_type", "layer_types", "hybrid_override_pattern")
    if isinstance(pattern, str):
        try:
            layers = tuple(LayerKind(character) for character in pattern if character != "|")
        except ValueError as error:
            raise InputError(
                f"hybrid_override_pattern holds a character that is no layer: {error}.", "Use M, *, - and E."
            ) from None
    else:
        layers = listed_layers(pattern, _NEMOTRON_KINDS)
    stated = config.stated.get("num_hidden_layers")
    if stated is not None and int(stated) != len(layers):
        config.assumed.append(f"{len(layers)} layers, as the pattern has; num_hidden_layers says {stated}.")
    dense = LayerKind.MLP in layers or LayerKind.MOE not in layers
    return fill_spec(
        config,
        layers=layers,
        # Older files call it attention_head_dim, which transformers does not read: its default happens to be theirs.
        head_dim=int(config["head_dim"]) if config.states("attention_head_dim") else config.size("head_dim"),
        mlp="plain" if dense else "moe",
        rope_theta=None,
        norm_eps=float(config["layer_norm_epsilon"]),
        names=weight_names(
            norm="norm_f",
            embedding="embeddings",
            # The second is as transformers 5.10.2 saved it.
            stored=("backbone.embeddings.weight", "backbone.embedding.weight", "model.embeddings.weight"),
        ),
    )


def bamba_spec(config: ConfigFile) -> TargetSpec:
    """Mamba-2 or attention, listed by number, then a gated MLP. Rope turns half of each head (hard-coded upstream)."""
    count = int(config.require("num_hidden_layers"))
    attention = {int(layer) for layer in config["attn_layer_indices"] or ()}
    if attention and not 0 <= min(attention) <= max(attention) < count:
        raise InputError(
            f"attn_layer_indices in the target's config.json names a layer outside 0 to {count - 1}.",
            "Restore the file from the checkpoint's repository.",
        )
    return fill_spec(
        config,
        layers=[LayerKind.DECODER if layer in attention else LayerKind.MAMBA2 for layer in range(count)],
        names=weight_names(norm="final_layernorm"),
    )


def granite_spec(config: ConfigFile) -> TargetSpec:
    """Mamba-2 or attention, then experts and a shared MLP, or the shared MLP alone.

    Rope only when ``position_embedding_type`` says so; the H models have none, the small dense ones have no Mamba-2
    layer. The model's own forward applies the multipliers of the embedding, of the scores and of every branch.
    """
    kinds = {**_MAMBA_NAMES, "attention": LayerKind.DECODER, "full_attention": LayerKind.DECODER}
    layers = listed_layers(config.require("layer_types", "layers_block_type"), kinds, config)
    experts = int(config["num_local_experts"] or 0)
    return fill_spec(
        config,
        layers=layers,
        mlp="moe" if experts else "gated",
        intermediate_size=None if experts else config.size("shared_intermediate_size"),
        rope_theta=config.rope_theta() if config["position_embedding_type"] == "rope" else None,
        logit_multiplier=1.0 / float(config["logits_scaling"] or 1.0),
    )


def falcon_h1_spec(config: ConfigFile) -> TargetSpec:
    """Attention and Mamba-2 side by side in every layer, on the same normed input; then a gated MLP.

    Many multipliers (maximal update parametrisation). transformers' own layers apply those around the mixer, the two
    functions below those inside its forward. Most checkpoints have no norm after the scan, only the gate.
    """
    return fill_spec(
        config,
        layers=(LayerKind.PARALLEL,) * int(config.require("num_hidden_layers")),
        logit_multiplier=float(config["lm_head_multiplier"] or 1.0),
        names=weight_names(norm="final_layernorm"),
    )


def _falcon_h1_project(mixer: Any, hidden: Tensor) -> Tensor:
    return mixer.in_proj(hidden * mixer.ssm_in_multiplier) * mixer.mup_vector


def _falcon_h1_norm(mixer: Any, y: Tensor, gate: Tensor) -> Tensor:
    return mixer.norm(y, gate) if mixer.mamba_rms_norm else y * F.silu(gate)


def zamba2_spec(config: ConfigFile) -> TargetSpec:
    """Mamba-2 layers, before some of which one of a few shared transformer blocks runs on input and embedding.

    The shared blocks' weights repeat in turn, with small adapters per use; keys and values belong to the use, so the
    layer id addresses them, not the block. Their attention is twice as wide as the model: a head has 2 · hidden / heads
    channels. Rope only with ``use_mem_rope``. Embedding and LM head are one tensor unless the config says otherwise.
    """
    listed = config.require("layers_block_type", "layer_types")
    return fill_spec(
        config,
        layers=listed_layers(listed, {**_MAMBA_NAMES, "hybrid": LayerKind.PARALLEL}, config),
        head_dim=int(config["attention_head_dim"]),
        intermediate_size=int(config["intermediate_size"]),
        rope_theta=config.rope_theta() if config["use_mem_rope"] else None,
        names=weight_names(norm="final_layernorm"),
    )


def qwen3_next_spec(config: ConfigFile) -> TargetSpec:
    """Gated delta nets and gated attention, each with an MLP or experts behind; also the text models of Qwen3.5.

    Every fourth layer attends unless the config says otherwise. The attention's query projection is twice as wide as
    its heads: the other half gates the output. Rope turns a quarter of each head. Norms keep their weights minus one.
    """
    if "mlp_only_layers" in config:
        step, only = int(config["decoder_sparse_step"]), config["mlp_only_layers"] or ()
        layers = range(int(config["num_hidden_layers"]))
        dense = not config["num_experts"] or any(layer in only or (layer + 1) % step for layer in layers)
    else:  # Qwen3.5: all layers are of one sort, and only dense ones state a width
        dense = "intermediate_size" in config
    kinds = {"linear_attention": LayerKind.DELTA, "full_attention": LayerKind.DECODER}
    return fill_spec(
        config,
        layers=listed_layers(config["layer_types"], kinds, config),
        mlp="gated" if dense else "moe",
    )


def qwen3_5_spec(config: ConfigFile) -> TargetSpec:
    """The language model of the published Qwen3.5 checkpoints, which transformers loads without what reads pictures."""
    names = weight_names(stored=("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"))
    return dataclasses.replace(
        qwen3_next_spec(config.text_config()), model_type=config.stated["model_type"], names=names
    )


def lfm2_spec(config: ConfigFile) -> TargetSpec:
    """Short convolutions or attention, then an MLP or experts. The last norm is called ``embedding_norm``.

    Checkpoints say which layers attend by a list of kinds or by ``full_attn_idxs``, and the MLP's width before an
    adjustment that the model makes: two thirds of it, rounded up.
    """
    dense = int(config.get("num_dense_layers", config["num_hidden_layers"]))
    width = int(config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):
        width, multiple = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3)), int(config["block_multiple_of"])
        width = -(-width // multiple) * multiple
    kinds = {"conv": LayerKind.CONV, "full_attention": LayerKind.DECODER}
    return fill_spec(
        config,
        layers=listed_layers(config["layer_types"], kinds, config),
        mlp="gated" if dense else "moe",
        intermediate_size=width if dense else None,
        names=weight_names(norm="embedding_norm"),
    )


def jamba_spec(config: ConfigFile) -> TargetSpec:
    """Mamba-1 or attention without rope, by a period and an offset, then an MLP or experts of the same width."""
    period, offset = int(config["attn_layer_period"]), int(config["attn_layer_offset"])
    layers = range(int(config.require("num_hidden_layers")))
    return fill_spec(
        config,
        layers=[LayerKind.DECODER if layer % period == offset else LayerKind.MAMBA1 for layer in layers],
        rope_theta=None,
        names=weight_names(norm="final_layernorm"),
    )


def mamba_spec(config: ConfigFile, kind: LayerKind) -> TargetSpec:
    """Every layer is one mixer of ``kind``, without attention, MLP or a limit of length."""
    return fill_spec(
        config,
        layers=(kind,) * int(config.require("num_hidden_layers")),
        head_dim=0,  # Mamba-2's head_dim is that of its states
        mlp="none",
        rope_theta=None,
        names=weight_names("backbone", norm="norm_f", embedding="embeddings"),
    )


def _hybrid(
    spec: Callable[[ConfigFile], TargetSpec],
    paths: Mapping[LayerKind, str],
    prepare: Callable[..., NewRecurrent | None] = mamba2.prepare,
    *,
    alone: bool = False,  # without attention: no mask, and the cache has another name
    **special: Any,
) -> Family:
    ready = functools.partial(prepare, paths=paths, **special)
    return Family(spec, ready, None, "cache_params") if alone else Family(spec, ready)


_QWEN3_NEXT = _hybrid(
    qwen3_next_spec,
    {LayerKind.DELTA: "linear_attn"},
    prepare,
    states=delta.DeltaStates,
    block_forward=delta.block_forward,
)
_QWEN3_5 = dataclasses.replace(_QWEN3_NEXT, spec=qwen3_5_spec)
_LFM2 = _hybrid(
    lfm2_spec,
    {LayerKind.CONV: "conv"},
    prepare,
    states=shortconv.ConvStates,
    block_forward=shortconv.block_forward,
)
_MAMBA = _hybrid(
    functools.partial(mamba_spec, kind=LayerKind.MAMBA1), {LayerKind.MAMBA1: "mixer"}, mamba1.prepare, alone=True
)

FAMILIES = {
    "nemotron_h": _hybrid(nemotron_h_spec, {LayerKind.MAMBA2: "mixer"}),
    "granitemoehybrid": _hybrid(granite_spec, {LayerKind.MAMBA2: "mamba"}),
    "bamba": _hybrid(bamba_spec, {LayerKind.MAMBA2: "mamba"}),
    "falcon_h1": _hybrid(
        falcon_h1_spec, {LayerKind.PARALLEL: "mamba"}, project=_falcon_h1_project, gated_norm=_falcon_h1_norm
    ),
    "zamba2": _hybrid(zamba2_spec, {LayerKind.MAMBA2: "mamba", LayerKind.PARALLEL: "mamba_decoder.mamba"}),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "jamba": _hybrid(jamba_spec, {LayerKind.MAMBA1: "mamba"}, mamba1.prepare),
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": _hybrid(functools.partial(mamba_spec, kind=LayerKind.MAMBA2), {LayerKind.MAMBA2: "mixer"}, alone=True),
}
