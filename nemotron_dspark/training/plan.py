"""Which samples each optimiser step takes. Counted from 0, a step is all the position a run has."""

import dataclasses
from functools import lru_cache

import numpy as np

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.anchors import epoch_order


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every epoch takes all samples once, in an order of its own."""

    num_samples: int
    steps_per_epoch: int  # a rest smaller than one global batch is left out of the epoch
    total_steps: int
    accumulation: int  # forwards per step

    @staticmethod
    def of(config: TrainConfig, num_samples: int) -> "Plan":
        """The plan for ``num_samples``; `InputError` when the batch sizes do not fit them or each other."""
        if config.global_batch_size % config.local_batch_size:
            raise InputError(
                f"train.global_batch_size {config.global_batch_size} is not a multiple of train.local_batch_size "
                f"{config.local_batch_size}.",
                "Change one of them.",
            )
        steps_per_epoch = num_samples // config.global_batch_size
        if not steps_per_epoch:
            raise InputError(
                f"The data has {num_samples} samples, but one optimiser step takes {config.global_batch_size}.",
                f"Add data, or set train.global_batch_size to at most {num_samples}.",
            )
        return Plan(
            num_samples,
            steps_per_epoch,
            config.max_steps or config.epochs * steps_per_epoch,
            config.global_batch_size // config.local_batch_size,
        )

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def visit(self, step: int) -> int:
        """How many times the samples of ``step`` were taken before; each time draws anchors of its own."""
        return self.epoch(step)

    def must_save(self, step: int) -> bool:
        """A checkpoint after ``step`` steps saves more than `train.checkpoint_every` says."""
        return step == self.total_steps

    def samples(self, step: int, config: TrainConfig) -> np.ndarray:
        """Ids of the samples of ``step`` [global_batch_size]."""
        size = config.global_batch_size
        first = step % self.steps_per_epoch * size
        return cached_order(self.num_samples, config.seed, self.epoch(step))[first : first + size]

    def micro_batches(self, step: int, config: TrainConfig, lengths: np.ndarray) -> list[np.ndarray]:
        """Sample ids of each forward of ``step``, longest first: forwards pad little and memory peaks early."""
        ids = self.samples(step, config)
        by_length = ids[np.argsort(-lengths[ids], kind="stable")]
        return np.split(by_length, self.accumulation)


@lru_cache(maxsize=2)
def cached_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(num_samples, seed=seed, epoch=epoch)
