"""Ordinary decoders: every layer is attention followed by a gated MLP (llama, qwen3)."""

from collections.abc import Mapping
from typing import Any

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


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    heads = int(require(config, "num_attention_heads"))
    hidden = int(require(config, "hidden_size"))
    rope = config.get("rope_parameters") or {}
    assumed = []
    theta = config.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        theta = 10000.0
        assumed.append("rope theta 10000: the config gives none and that is the transformers default.")
    return TargetSpec(
        name=name,
        model_type=config["model_type"],
        layers=(LayerKind.DECODER,) * int(require(config, "num_hidden_layers")),
        hidden_size=hidden,
        vocab_size=int(require(config, "vocab_size")),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or (128 if config["model_type"] == "qwen3" else hidden // heads)),
        mlp="gated",
        intermediate_size=int(require(config, "intermediate_size")),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        max_position_embeddings=int(require(config, "max_position_embeddings")),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=NAMES,
        assumed=tuple(assumed),
    )


def prepare(model: Any, spec: TargetSpec) -> None:
    """Nothing to prepare: there is no recurrent layer."""


def block_mask(model: Any, state: TargetState, block: int) -> Any:
    """The ``attention_mask`` argument for the next ``block`` tokens behind ``state``."""
    return state.mask(block, model.device)
