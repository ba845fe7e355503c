"""What the hybrids besides Nemotron-H share: every layer also has an MLP, and masks go by kind of layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.recurrent import NewRecurrent, mixers_of
from nemotron_dspark.targets.spec import DECODER_NAMES, LayerKind, TargetSpec, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def listed_layers(config: Mapping[str, Any], kinds: Mapping[str, LayerKind], *keys: str) -> tuple[LayerKind, ...]:
    """The layers that the list under the first of ``keys`` present in ``config`` names.

    Raises:
        InputError: no such list, a kind of layer that is not in ``kinds``, or another number of layers than stated.
    """
    listed = require(config, *keys)
    unknown = sorted({str(kind) for kind in listed} - set(kinds))
    if unknown:
        raise InputError(
            f"The target's config.json names an unknown layer kind {unknown[0]!r}.", f"Known kinds: {', '.join(kinds)}."
        )
    stated = config.get("num_hidden_layers")
    if stated is not None and int(stated) != len(listed):
        raise InputError(
            f"The target's config.json lists {len(listed)} layers, but num_hidden_layers says {stated}.",
            "Restore the file from the checkpoint's repository.",
        )
    return tuple(kinds[kind] for kind in listed)


def rope_theta(config: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """The base of the rotary embedding, and a sentence when it had to be assumed."""
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    if theta:
        return float(theta), ()
    return 10000.0, ("rope theta 10000: the config gives none and that is the transformers default.",)


def hybrid_spec(
    config: Mapping[str, Any],
    name: str,
    *,
    layers: Sequence[LayerKind],
    final_norm: str,
    **special: Any,
) -> TargetSpec:
    """A spec with the fields that all these configs spell alike; ``special`` overrides any of them."""
    heads = int(require(config, "num_attention_heads"))
    hidden = int(require(config, "hidden_size"))
    spec = TargetSpec(
        name=name,
        model_type=config["model_type"],
        layers=tuple(layers),
        hidden_size=hidden,
        vocab_size=int(require(config, "vocab_size")),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        mlp="gated",
        intermediate_size=config.get("intermediate_size"),
        norm_eps=float(special.pop("norm_eps", None) or require(config, "rms_norm_eps", "norm_eps")),
        rope_theta=None,
        max_position_embeddings=int(
            special.pop("max_position_embeddings", None) or require(config, "max_position_embeddings")
        ),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=dataclasses.replace(DECODER_NAMES, final_norm=f"model.{final_norm}"),
    )
    return dataclasses.replace(spec, **special)


def prepare_mamba2(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """`Family.prepare` of a model whose Mamba-2 layers, if it has any, call their mixer ``mamba``.

    The step size keeps the config's ``time_step_limit``, also for a single token, where transformers does not clamp.
    """
    mixers = mixers_of(model, spec, LayerKind.MAMBA2, "mamba")
    return mamba2.prepare(mixers, model.config.time_step_limit)
