"""FSDP2: every process keeps its part of the weights' fp32 masters, of their gradients and of the moments.

A layer's weights are put together for its forward and its backward, in the type of the draft. The embedding and the
head do not train; every process has them whole.
"""

import torch
from torch import Tensor

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.training.objective import Objective
from nemotron_dspark.training.ranks import Ranks


def shards(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether weights are spread over ``ranks``."""
    return config.parallel == "fsdp" and ranks.size > 1


def shard(objective: Objective, device: torch.device, ranks: Ranks) -> None:
    """Spread the trained weights of a whole draft over ``ranks``, in place; each layer is moved to ``device`` first."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    draft = objective.draft
    policy = MixedPrecisionPolicy(param_dtype=draft.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = DeviceMesh.from_group(ranks.device_group(device), device.type)
    for parameter in draft.trainable_parameters().values():
        parameter.data = parameter.data.float()
    for layer in draft.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    frozen = {draft.embed_tokens.weight, draft.lm_head.weight}
    fully_shard(objective, mesh=mesh, mp_policy=policy, ignored_params=frozen)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a part. (A DTensor, told without importing its module, which takes seconds.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` put together from its parts, on every rank; all ranks call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole ``tensor``, placed as ``like`` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
