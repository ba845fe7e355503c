"""FSDP2: every process keeps a part of the fp32 parameters, of their gradients and of the moments.

A layer's parameters are gathered for its forward and its backward, in the type that the draft computes in. The
embedding and the head do not train; every process has them whole.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import DistContext
from nemotron_dspark.drafts.dspark import SHARED, Draft

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def uses_fsdp(config: TrainConfig, context: DistContext) -> bool:
    """Whether parameters are sharded over the processes of ``context``."""
    return config.parallel == "fsdp" and context.world_size > 1


def shard(objective: nn.Module, draft: Draft, device: torch.device, context: DistContext) -> None:
    """Shard the fp32 parameters of ``draft`` in place; each layer is moved to ``device`` first.

    ``objective`` is the module around the draft whose forward needs the parameters outside of the layers.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gathered in the compute type, half the traffic of fp32; the modules' own casts then have nothing to do.
    policy = MixedPrecisionPolicy(
        param_dtype=draft.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = DeviceMesh.from_group(context.process_group(device), device.type)
    for layer in draft.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    frozen = {parameter for name, parameter in draft.named_parameters() if name in SHARED}
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=frozen)


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether ``tensor`` is a shard, told without importing DTensor's module, which takes seconds."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gather ``tensor`` if it is a shard; all ranks call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of the full ``tensor``, placed as ``like`` is."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
