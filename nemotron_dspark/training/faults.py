"""After a step whose loss is not finite: which of its samples it is because of."""

import numpy as np
import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.training.batches import Loader
from nemotron_dspark.training.objective import Objective
from nemotron_dspark.training.ranks import Ranks
from nemotron_dspark.training.sharding import is_sharded


def samples_at_fault(
    objective: Objective, load: Loader, step: int, config: TrainConfig, device: torch.device, ranks: Ranks
) -> list[int]:
    """Ids of the samples of ``step`` that alone give a loss, or gradients, that are not finite; of all ranks.

    Of sharded weights a rank never sees the gradients of its own samples; there it is the loss alone.
    """
    ids = np.sort(load.plan.samples(step, config))
    own = np.concatenate(load.plan.micro_batches(step, config, load.source.lengths))
    parameters = list(objective.draft.trainable_parameters().values())
    sharded = any(map(is_sharded, parameters))
    bad = torch.zeros(len(ids))
    for sample_id in own:
        with torch.set_grad_enabled(not sharded):
            total, _ = objective(load(step, np.array([sample_id])).to(device))
            numbers = [total]
            if not sharded:
                numbers += torch.autograd.grad(total, parameters, allow_unused=True)
        finite = all(number.float().norm().isfinite() for number in numbers if number is not None)
        bad[np.searchsorted(ids, sample_id)] = not finite
    return ids[(ranks.sum(bad) > 0).numpy()].tolist()
