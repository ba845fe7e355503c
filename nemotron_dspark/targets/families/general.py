"""Any other decoder that `transformers` can build: parts found on the built model, state by copy and replay.

Nothing is known of the layers, so nothing is assumed of them either: the proofs decide whether such a target is right.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from nemotron_dspark.errors import InputError, first_line
from nemotron_dspark.targets.families.config import ConfigFile
from nemotron_dspark.targets.families.family import Family
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, WeightNames

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_WITHOUT_ATTENTION = frozenset({"rwkv"})
_REPLAYED = "the general path (copy, restore, replay) rolls it back, and the proofs decide."
_DO = "Support for this type needs a family module (docs/targets.md tells how to write one)."


def spec(config: ConfigFile) -> TargetSpec:
    """Spec of a config whose type `transformers` itself knows."""
    return _spec(lambda: config.built, config.name, trusted=False)


def remote_spec(folder: Path, name: str) -> TargetSpec:
    """Spec of a checkpoint whose model is code in its own folder, which this runs."""
    from transformers import AutoConfig

    return _spec(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True), name, trusted=True)


def _spec(read: Callable[[], "PreTrainedConfig"], name: str, *, trusted: bool) -> TargetSpec:
    from transformers import AutoModelForCausalLM

    try:
        config = read()
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except InputError:
        raise
    except Exception as error:  # whatever the library or the checkpoint's code raises on this config
        raise InputError(
            f"transformers cannot build a causal language model from the config of {name}: {first_line(error)}.",
            "Check that the target is a text model; one of several modalities needs its language model alone.",
        ) from None
    # The model has shapes and no numbers: what the config does not say is read off its modules.
    names, text = _names(model, name), config.get_text_config()
    layers = cast(nn.ModuleList, model.get_submodule(names.layers))
    intermediate = getattr(text, "intermediate_size", None)
    if config.model_type in _WITHOUT_ATTENTION:
        kind, mlp, heads, heads_kv, head_dim = LayerKind.RECURRENT, "plain", 0, 0, 0
        assumed = f"No layer of {config.model_type!r} has attention: {_REPLAYED}"
    else:
        heads = _stated(text, "num_attention_heads", name)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        # Where every layer has a shape of its own the config has nulls: the layers themselves tell.
        heads_kv = getattr(text, "num_key_value_heads", None) or _widest(layers, "k_proj") // head_dim
        heads_kv = heads_kv if isinstance(heads_kv, int) and heads_kv else heads
        intermediate = intermediate or _widest(layers, "gate_proj")
        kind, mlp = LayerKind.DECODER, "gated" if isinstance(intermediate, int) and intermediate else "moe"
        assumed = f"No family module knows {config.model_type!r}: every layer is drawn as a decoder layer, {_REPLAYED}"
    theta = getattr(text, "rope_theta", None) or (getattr(text, "rope_parameters", None) or {}).get("rope_theta")
    eps = getattr(text, "rms_norm_eps", None) or getattr(text, "layer_norm_epsilon", None)
    return TargetSpec(
        name=name,
        model_type=str(config.model_type),
        layers=(kind,) * len(layers),
        hidden_size=_stated(text, "hidden_size", name),
        vocab_size=_stated(text, "vocab_size", name),
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        head_dim=head_dim,
        mlp=mlp,
        intermediate_size=None if mlp == "moe" else intermediate,
        norm_eps=float(eps or 1e-6),
        rope_theta=float(theta) if theta else None,
        max_position_embeddings=_stated(text, "max_position_embeddings", name),
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        names=names,
        logit_softcap=getattr(text, "final_logit_softcapping", None),
        assumed=(assumed,),
    )


def _stated(config: "PreTrainedConfig", key: str, name: str) -> int:
    """A size that every draft takes from its target."""
    value = getattr(config, key, None)
    if not isinstance(value, int):
        raise InputError(
            f"The config of {name} (type {config.model_type!r}) states no {key}, which its draft needs.", _DO
        )
    return value


def _widest(layers: nn.Module, name: str) -> int:
    """The most output channels of the linear layers called ``name``; 0 when there are none."""
    linears = (module for path, module in layers.named_modules() if path.rpartition(".")[2] == name)
    return max((module.out_features for module in linears if isinstance(module, nn.Linear)), default=0)


def _names(model: "PreTrainedModel", name: str) -> WeightNames:
    """Layers, final norm, embedding and head, found by what they are."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if embedding is None or head is None or not lists:
        raise InputError(f"{name} has no list of {depth} layers between an embedding and an LM head.", _DO)
    layers = min(lists, key=lambda path: path.count("."))
    base = layers.rpartition(".")[0]
    norms = [path for path, _ in model.get_submodule(base).named_children() if "norm" in path or path.startswith("ln_")]
    if not norms:
        raise InputError(f"{name} has no norm between its layers and its LM head.", _DO)
    embedding_path, head_path = paths[id(embedding)], paths[id(head)]
    return WeightNames(
        layers=layers,
        final_norm=f"{base}.{norms[-1]}" if base else norms[-1],
        embedding=embedding_path,
        head=head_path,
        embedding_tensors=(f"{embedding_path}.weight",),
        head_tensors=(f"{head_path}.weight",),
    )


FAMILY = Family(spec, block_mask=None, replays=True)
