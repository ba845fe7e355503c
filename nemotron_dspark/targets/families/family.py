"""What a family of targets has to say: how to read its config, and what its loaded model needs to be rolled back."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.config import ConfigFile
from nemotron_dspark.targets.recurrent import NewRecurrent, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec
from nemotron_dspark.targets.state import State, TargetState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask: TypeAlias = Tensor | dict[str, Tensor | None] | None  # a model's `attention_mask`, or one per kind of layer


def no_recurrent_layers(model: "PreTrainedModel", spec: TargetSpec) -> None:
    """`Family.prepare` of a model without recurrent layers."""


def prepare_mamba2(
    model: "PreTrainedModel",
    spec: TargetSpec,
    *,
    kind: LayerKind = LayerKind.MAMBA2,
    name: str = "mamba",
    **special: Any,
) -> NewRecurrent | None:
    """`Family.prepare` of a model whose layers of ``kind``, if it has any, call their Mamba-2 mixer ``name``.

    The step size keeps the limits that the config states, [0, inf] in most published ones, also for a single token.
    transformers clamps it in its chunked form (Nemotron-H's at ``time_step_min``) and not in its one-token form;
    engines and NVIDIA's kernels never do. ``special`` goes to `mamba2.prepare`.
    """
    return mamba2.prepare(mixers_of(model, spec, kind, name), model.config.time_step_limit, **special)


def one_mask(model: "PreTrainedModel", state: TargetState, block: int) -> Tensor:
    """`Family.block_mask` of a model whose layers all see as far as each other."""
    return _as_read(model, state.mask(block, model.device, getattr(model.config, "sliding_window", None)))


def mask_by_layer_type(model: "PreTrainedModel", state: TargetState, block: int) -> dict[str, Tensor | None]:
    """`Family.block_mask` of a model whose forward takes one mask for each kind of attention layer."""
    windows = {"full_attention": None, "sliding_attention": getattr(model.config, "sliding_window", None)}
    return {
        kind: _as_read(model, state.mask(block, model.device, windows[kind]))
        for kind in sorted(set(model.config.layer_types))
    }


def mask_beside_recurrence(model: "PreTrainedModel", state: TargetState, block: int) -> dict[str, Tensor | None]:
    """`Family.block_mask` of a hybrid: a mask for attention, none for its recurrent layers."""
    return {"full_attention": state.mask(block, model.device), "linear_attention": None, "conv": None}


def no_mask(model: "PreTrainedModel", state: State, block: int) -> None:
    """`Family.block_mask` of a model that masks by its own cache."""


def _as_read(model: "PreTrainedModel", mask: Tensor) -> Tensor:
    """``mask`` as the model's attention reads it: eager attention adds it to the scores."""
    if model.config._attn_implementation != "eager":
        return mask
    hidden = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, hidden)


def as_it_is(model: "PreTrainedModel", length: int) -> contextlib.AbstractContextManager[None]:
    """`Family.capture_context` of a model that needs none."""
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table in `targets/families`: everything in the project that depends on a target's type."""

    spec: Callable[[ConfigFile], TargetSpec]
    # Make a loaded model ready for `TargetState`; returns how to make its recurrent states.
    prepare: Callable[["PreTrainedModel", TargetSpec], NewRecurrent | None] = no_recurrent_layers
    # The model's `attention_mask` for the next `block` tokens behind a state.
    block_mask: Callable[["PreTrainedModel", TargetState, int], Mask] = one_mask
    cache_argument: str = "past_key_values"  # what the model's forward calls its cache
    replays: bool = False  # roll back by `ReplayState`, which needs to know nothing of the layers
    attention: str | None = None  # the implementation to load, where SDPA would leave something out
    # Entered around a forward of whole sequences of this length.
    capture_context: Callable[["PreTrainedModel", int], contextlib.AbstractContextManager[None]] = as_it_is
