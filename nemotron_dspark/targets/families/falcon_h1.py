"""Falcon-H1: attention and Mamba-2 side by side in every layer, on the same normed input; then a gated MLP.

Many multipliers (maximal update parametrisation). Those of embedding, keys, attention, MLP and of Mamba-2's output are
applied by transformers' own layers around the mixer. Those of Mamba-2's input and of each part of its projection belong
to the mixer's forward, so `_project` applies them. ``lm_head_multiplier`` is the spec's logit multiplier. Most
checkpoints have no norm after the scan, only the gate (``mamba_rms_norm``), and where there is one it may come before
the gate or after.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families import hybrids
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence
from nemotron_dspark.targets.recurrent import NewRecurrent, mixers_of
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def spec(config: Mapping[str, Any], name: str) -> TargetSpec:
    theta, assumed = hybrids.rope_theta(config)
    return hybrids.hybrid_spec(
        config,
        name,
        layers=(LayerKind.PARALLEL,) * int(require(config, "num_hidden_layers")),
        final_norm="final_layernorm",
        intermediate_size=int(require(config, "intermediate_size")),
        rope_theta=theta,
        logit_multiplier=float(config.get("lm_head_multiplier") or 1.0),
        assumed=assumed,
    )


def prepare(model: "PreTrainedModel", spec: TargetSpec) -> NewRecurrent | None:
    """Make a loaded model ready for `TargetState`; how to make its Mamba-2 states.

    The step size keeps the config's ``time_step_limit``, also for a single token, where transformers does not clamp.
    """
    mixers = mixers_of(model, spec, LayerKind.PARALLEL, "mamba")
    return mamba2.prepare(mixers, model.config.time_step_limit, project=_project, gated_norm=_gated_norm)


def _project(mixer: Any, hidden: Tensor) -> Tensor:
    return mixer.in_proj(hidden * mixer.ssm_in_multiplier) * mixer.mup_vector


def _gated_norm(mixer: Any, y: Tensor, gate: Tensor) -> Tensor:
    return mixer.norm(y, gate) if mixer.mamba_rms_norm else y * F.silu(gate)


FAMILY = Family(spec, prepare, mask_beside_recurrence, capture_context=mamba2.even_chunks)
