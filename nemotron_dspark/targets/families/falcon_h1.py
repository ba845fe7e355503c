"""Falcon-H1: attention and Mamba-2 side by side in every layer, on the same normed input; then a gated MLP.

Many multipliers (maximal update parametrisation). Those of embedding, keys, attention, MLP and of Mamba-2's output are
applied by transformers' own layers around the mixer. Those of Mamba-2's input and of each part of its projection belong
to the mixer's forward, so `_project` applies them. ``lm_head_multiplier`` is the spec's logit multiplier. Most
checkpoints have no norm after the scan, only the gate (``mamba_rms_norm``), and where there is one it may come before
the gate or after.
"""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nemotron_dspark.targets import mamba2
from nemotron_dspark.targets.families.config import ConfigFile, fill_spec
from nemotron_dspark.targets.families.family import Family, mask_beside_recurrence, prepare_mamba2
from nemotron_dspark.targets.spec import LayerKind, TargetSpec, decoder_names


def spec(config: ConfigFile) -> TargetSpec:
    return fill_spec(
        config,
        layers=(LayerKind.PARALLEL,) * int(config.require("num_hidden_layers")),
        intermediate_size=config.size("intermediate_size"),
        rope_theta=config.rope_theta(),
        logit_multiplier=float(config["lm_head_multiplier"] or 1.0),
        names=decoder_names("final_layernorm"),
    )


def _project(mixer: Any, hidden: Tensor) -> Tensor:
    return mixer.in_proj(hidden * mixer.ssm_in_multiplier) * mixer.mup_vector


def _gated_norm(mixer: Any, y: Tensor, gate: Tensor) -> Tensor:
    return mixer.norm(y, gate) if mixer.mamba_rms_norm else y * F.silu(gate)


FAMILY = Family(
    spec,
    functools.partial(prepare_mamba2, kind=LayerKind.PARALLEL, project=_project, gated_norm=_gated_norm),
    mask_beside_recurrence,
    capture_context=mamba2.even_chunks,
)
