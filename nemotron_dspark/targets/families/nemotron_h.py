"""Nemotron-H, Nano v2, Nemotron 3: every layer is one mixer, Mamba-2, attention without rope, MLP or experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, WeightNames, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = WeightNames(
    layers="model.layers",
    final_norm="model.norm_f",
    embedding="model.embeddings",
    head="lm_head",
    embedding_tensors=(
        "backbone.embeddings.weight",
        "backbone.embedding.weight",  # as transformers 5.10.2 saved it
        "model.embeddings.weight",
    ),
    head_tensors=("lm_head.weight",),
)

_KIND_NAMES = {
    "mamba": LayerKind.MAMBA2,
    "mamba2": LayerKind.MAMBA2,
    "linear_attention": LayerKind.MAMBA2,
    "attention": LayerKind.ATTENTION,
    "full_attention": LayerKind.ATTENTION,
    "mlp": LayerKind.MLP,
    "moe": LayerKind.MOE,
}


def _layers(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    listed = config.get("layers_block_type") or config.get("layer_types")
    if listed:
        unknown = sorted({str(kind) for kind in listed} - set(_KIND_NAMES))
        if unknown:
            raise InputError(
                f"The target's config.json names an unknown layer kind {unknown[0]!r}.",
                f"Known kinds: {', '.join(_KIND_NAMES)}.",
            )
        return tuple(_KIND_NAMES[kind] for kind in listed)
    pattern = require(config, "hybrid_override_pattern", "layers_block_type")
    try:
        return tuple(LayerKind(character) for character in pattern if character != "|")
    except ValueError as error:
        raise InputError(
            f"hybrid_override_pattern holds a character that is no layer: {error}.", "Use M, *, - and E."
        ) from None


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    layers = _layers(config)
    assumed = []
    head_dim = config.get("head_dim") or config.get("attention_head_dim")
    if head_dim is None:
        head_dim = 128
        assumed.append("head_dim 128: the config gives none and that is the family's value.")
    stated = config.get("num_hidden_layers")
    if stated is not None and int(stated) != len(layers):
        assumed.append(f"{len(layers)} layers, as the pattern has; num_hidden_layers says {stated}.")
    experts = LayerKind.MOE in layers
    plain = LayerKind.MLP in layers
    return TargetSpec(
        name=name,
        model_type="nemotron_h",
        layers=layers,
        hidden_size=int(require(config, "hidden_size")),
        vocab_size=int(require(config, "vocab_size")),
        num_attention_heads=int(require(config, "num_attention_heads")),
        num_key_value_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        head_dim=int(head_dim),
        mlp="plain" if plain or not experts else "moe",
        intermediate_size=int(require(config, "intermediate_size")) if plain or not experts else None,
        norm_eps=float(require(config, "layer_norm_epsilon", "norm_eps", "rms_norm_eps")),
        rope_theta=None,  # a rope_theta field in the config is unused by the architecture
        max_position_embeddings=int(require(config, "max_position_embeddings")),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=NAMES,
        assumed=tuple(assumed),
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make its Mamba-2 states.

    The step size keeps the limits that the config states, [0, inf] in every published one. transformers clamps it at
    ``time_step_min`` in its chunked form and not in its one-token form; engines and NVIDIA's kernels never do. Ultra's
    config spells infinity 1e308, which no fp32 tensor can be clamped at.
    """
    mixers = mixers_of(model, spec, LayerKind.MAMBA2, "mixer")
    return mamba2.prepare(mixers, model.config.time_step_limit)


FAMILY = Family(spec, prepare, mask_beside_recurrence, capture_context=mamba2.even_chunks)
