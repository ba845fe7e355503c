"""Find the samples that make the loss of a step infinite or NaN."""

import numpy as np
import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import DistContext
from nemotron_dspark.training.batches import Loader
from nemotron_dspark.training.objective import Objective
from nemotron_dspark.training.sharding import is_dtensor


def samples_at_fault(
    objective: Objective, load: Loader, step: int, config: TrainConfig, device: torch.device, context: DistContext
) -> list[int]:
    """Ids of the samples of ``step`` that alone give a loss, or gradients, that are not finite; of all ranks.

    Of sharded weights a rank never sees the gradients of its own samples; there it is the loss alone.
    """
    ids = np.sort(load.schedule.samples(step, config))
    own = np.concatenate(load.schedule.micro_batches(step, config, load.source.lengths))
    parameters = list(objective.draft.trainable_parameters().values())
    sharded = any(map(is_dtensor, parameters))
    bad = torch.zeros(len(ids))
    for sample_id in own:
        with torch.set_grad_enabled(not sharded):
            total = objective(load(step, np.array([sample_id])).to(device)).total
            numbers = [total]
            if not sharded:
                numbers += torch.autograd.grad(total, parameters, allow_unused=True)
        finite = all(number.float().norm().isfinite() for number in numbers if number is not None)
        bad[np.searchsorted(ids, sample_id)] = not finite
    return ids[(context.all_reduce_sum(bad) > 0).numpy()].tolist()
