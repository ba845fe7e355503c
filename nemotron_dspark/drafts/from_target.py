"""A draft that starts from copies of the target's last layers instead of random weights.

A draft's context is a hidden state of the target behind RMSNorm, which is what a layer of the target makes its keys and
values of. So with the last tap passed on as it is, a copied layer attends from the first step on, and its MLP writes in
the directions that the LM head reads. Training changes all of it.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from nemotron_dspark.drafts.dspark import Draft, DSparkDraft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.weights import open_tensors

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_NEEDED = {
    *("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"),
    *(f"self_attn.{name}.weight" for name in _ATTENTION),
    *(f"mlp.{name}.weight" for name in _MLP),
}
_HEAD_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}  # Qwen3's
_OTHER_TAPS_STD = 0.005  # of the weights that add the other taps to the last one


def start_from_target(draft: Draft, folder: Path, spec: TargetSpec) -> None:
    """Copy the last layers of the checkpoint in ``folder`` into ``draft``, whose embeddings it has.

    Raises:
        InputError: these layers are not like Llama's or Qwen3's, or have another shape than the draft's.
    """
    if not isinstance(draft, DSparkDraft):
        raise InputError(
            f"The layer of an {draft.config.kind} draft is twice as wide as its target, and none of the target's fits.",
            "Set train.init=random.",
        )
    count = draft.config.num_hidden_layers
    layers = [_layer(folder, index) for index in range(max(0, spec.num_layers - count), spec.num_layers)]
    own, tensors = dict(draft.named_parameters()), open_tensors(folder)
    final = tensors[f"{spec.names.final_norm}.weight"]()
    values: dict[str, Tensor] = {"norm.weight": final * draft.config.target_logit_multiplier}
    for index, layer in enumerate(layers):
        # The context passes no norm of the layer, so the norm's weights move into what reads it.
        attended, fed = layer["input_layernorm.weight"].float(), layer["post_attention_layernorm.weight"].float()
        copied = {name: layer[name] for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}
        copied |= {name: layer[name].float() * attended for name in (f"self_attn.{part}.weight" for part in _ATTENTION)}
        copied |= {name: layer[name].float() * fed for name in (f"mlp.{part}.weight" for part in _MLP)}
        for part in ("q", "k"):  # a draft has norms of its heads: at the size that the target's heads have without
            norm, rows = f"self_attn.{part}_norm.weight", copied[f"self_attn.{part}_proj.weight"]
            copied[norm] = layer.get(norm, rows.square().sum(1).mean().sqrt().expand(draft.config.head_dim))
        values |= {f"layers.{index}.{name}": value for name, value in copied.items()}
    generator = torch.Generator().manual_seed(count)
    taps = torch.empty(own["fc.weight"].shape).normal_(0.0, _OTHER_TAPS_STD, generator=generator)
    hidden = draft.config.hidden_size
    taps[:, -hidden:] = torch.eye(hidden)
    for name, value in (values | {"fc.weight": taps}).items():
        if own[name].shape != value.shape:
            raise InputError(
                f"The target's last layers do not have the draft's shape: {name} is {tuple(value.shape)} there and "
                f"{tuple(own[name].shape)} in the draft.",
                "Set train.init=random, or leave the keys of the draft's shape out.",
            )
        own[name].data.copy_(value)


def _layer(folder: Path, index: int) -> dict[str, Tensor]:
    """The tensors of layer ``index`` by their names in it."""
    pattern = re.compile(rf"(?:.*\.)?layers\.{index}\.(.+)")
    readers = {found[1]: read for name, read in open_tensors(folder).items() if (found := pattern.fullmatch(name))}
    if not set(readers) >= _NEEDED or set(readers) - _NEEDED - _HEAD_NORMS:
        raise InputError(
            f"Layer {index} of the target is not one of Llama's or Qwen3's kind, and no draft can start from others.",
            "Set train.init=random.",
        )
    return {name: read() for name, read in readers.items()}
