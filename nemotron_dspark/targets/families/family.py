"""What a family of targets has to say: how to read its config, and what its loaded model needs to be rolled back."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from nemotron_dspark.targets.families.config import ConfigFile
from nemotron_dspark.targets.recurrent import NewRecurrent
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.state import TargetState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask: TypeAlias = Tensor | dict[str, Tensor | None]  # a model's `attention_mask`, or one per kind of layer


def one_mask(model: "PreTrainedModel", state: TargetState, block: int) -> Tensor:
    """`Family.block_mask` of a model whose layers all see as far as each other."""
    return _as_read(model, state.mask(block, model.device, getattr(model.config, "sliding_window", None)))


def mask_by_layer_type(model: "PreTrainedModel", state: TargetState, block: int) -> dict[str, Tensor | None]:
    """`Family.block_mask` of a model whose forward takes a mask for each kind of layer; a recurrent one needs none."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    everything = _as_read(model, state.mask(block, model.device))
    near = everything if window is None else _as_read(model, state.mask(block, model.device, window))
    return {"full_attention": everything, "sliding_attention": near, "linear_attention": None, "conv": None}


def _as_read(model: "PreTrainedModel", mask: Tensor) -> Tensor:
    """``mask`` as the model's attention reads it: eager attention adds it to the scores."""
    if model.config._attn_implementation != "eager":
        return mask
    hidden = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, hidden)


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table in `targets/families`: everything in the project that depends on a target's type."""

    spec: Callable[[ConfigFile], TargetSpec]
    # Make a loaded model ready for `TargetState`; returns how to make its recurrent states. None without such layers.
    prepare: Callable[["PreTrainedModel", TargetSpec], NewRecurrent | None] | None = None
    # The model's `attention_mask` for the next `block` tokens behind a state; None: it masks by its own cache.
    block_mask: Callable[["PreTrainedModel", TargetState, int], Mask] | None = mask_by_layer_type
    cache_argument: str = "past_key_values"  # what the model's forward calls its cache
    replays: bool = False  # roll back by `ReplayState`, which needs to know nothing of the layers
    attention: str | None = None  # the implementation to load, where SDPA would leave something out
