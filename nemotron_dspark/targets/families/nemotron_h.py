"""Nemotron-H, Nano v2, Nemotron 3: every layer is one mixer, Mamba-2, attention without rope, MLP or experts."""

import functools

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence, prepare_mamba2
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, WeightNames

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


def _layers(config: ConfigFile) -> tuple[LayerKind, ...]:
    """As the file lists them or draws them: the class's default for a file that does neither is a toy of four."""
    pattern = config.require("layers_block_type", "layer_types", "hybrid_override_pattern")
    if isinstance(pattern, str):
        try:
            return tuple(LayerKind(character) for character in pattern if character != "|")
        except ValueError as error:
            raise InputError(
                f"hybrid_override_pattern holds a character that is no layer: {error}.", "Use M, *, - and E."
            ) from None
    unknown = sorted({str(kind) for kind in pattern} - set(_KIND_NAMES))
    if unknown:
        raise InputError(
            f"The target's config.json names an unknown layer kind {unknown[0]!r}.",
            f"Known kinds: {', '.join(_KIND_NAMES)}.",
        )
    return tuple(_KIND_NAMES[kind] for kind in pattern)


def spec(config: ConfigFile) -> TargetSpec:
    layers = _layers(config)
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
        intermediate_size=config.size("intermediate_size") if dense else None,
        norm_eps=float(config["layer_norm_epsilon"]),
        names=NAMES,
    )


FAMILY = Family(
    spec,
    functools.partial(prepare_mamba2, name="mixer"),
    mask_beside_recurrence,
    capture_context=mamba2.even_chunks,
)
