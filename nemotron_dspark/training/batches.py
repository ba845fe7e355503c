"""From a target cache to the batches of each optimiser step: a function of the seed and the step, nothing else."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.anchors import counted_slots, draw_anchors, epoch_order


class SampleLike(Protocol):
    """What `cache.reader.Sample` holds."""

    input_ids: Tensor  # int64 [S]
    loss_mask: Tensor  # bool [S]
    taps: Tensor  # [S, T·H]
    last: Tensor  # [S, H]


class CacheLike(Protocol):
    """What training asks of a cache; `cache.reader.TargetCache` has it."""

    @property
    def lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, sample_id: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one forward, padded on the right, with their blocks."""

    input_ids: Tensor  # int64 [B, S]
    taps: Tensor  # [B, S, T·H]
    last: Tensor | None  # [B, S, H]; None when no loss term needs it
    anchors: Tensor  # int64 [B, A]
    valid: Tensor  # bool [B, A]; False: a filler
    counted: Tensor  # bool [B, A, γ]
    tokens: int  # without padding

    def to(self, device: torch.device) -> "Batch":
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pinned(self) -> "Batch":
        pinned = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **pinned)


def collate(
    samples: Sequence[SampleLike],
    anchors: Sequence[Tensor],  # per sample [≤ A]
    block_size: int,
    *,
    with_last: bool = True,
) -> Batch:
    """One batch; A is the largest number of anchors any of the samples has (at least 1)."""
    width = max(1, *(len(drawn) for drawn in anchors))
    counted = torch.zeros(len(samples), width, block_size, dtype=torch.bool)
    positions = torch.zeros(len(samples), width, dtype=torch.long)
    valid = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, (sample, drawn) in enumerate(zip(samples, anchors, strict=True)):
        positions[row, : len(drawn)] = drawn
        valid[row, : len(drawn)] = True
        counted[row, : len(drawn)] = counted_slots(sample.loss_mask, drawn, block_size)
    return Batch(
        pad_sequence([sample.input_ids for sample in samples], batch_first=True),
        pad_sequence([sample.taps for sample in samples], batch_first=True),
        pad_sequence([sample.last for sample in samples], batch_first=True) if with_last else None,
        positions,
        valid,
        counted,
        sum(len(sample.input_ids) for sample in samples),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which samples each optimiser step takes. Counted from 0, a step is all the position a run has."""

    num_samples: int
    steps_per_epoch: int  # a rest smaller than one global batch is left out of the epoch
    total_steps: int
    accumulation: int  # forwards per step

    @staticmethod
    def of(config: TrainConfig, num_samples: int) -> "Plan":
        """The plan for a cache of ``num_samples``; `InputError` when the batch sizes do not fit it or each other."""
        if config.global_batch_size % config.local_batch_size:
            raise InputError(
                f"train.global_batch_size {config.global_batch_size} is not a multiple of train.local_batch_size "
                f"{config.local_batch_size}.",
                "Change one of them.",
            )
        steps_per_epoch = num_samples // config.global_batch_size
        if not steps_per_epoch:
            raise InputError(
                f"The cache has {num_samples} samples, but one optimiser step takes {config.global_batch_size}.",
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

    def micro_batches(self, step: int, config: TrainConfig, lengths: np.ndarray) -> list[np.ndarray]:
        """Sample ids of each forward of ``step``, longest first: forwards pad little and memory peaks early."""
        size = config.global_batch_size
        first = step % self.steps_per_epoch * size
        ids = _cached_order(self.num_samples, config.seed, self.epoch(step))[first : first + size]
        by_length = ids[np.argsort(-lengths[ids], kind="stable")]
        return np.split(by_length, self.accumulation)


@lru_cache(maxsize=2)
def _cached_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(num_samples, seed=seed, epoch=epoch)


def batches(
    cache: CacheLike,
    plan: Plan,
    config: TrainConfig,
    *,
    first_step: int,
    num_anchors: int,
    block_size: int,
    with_last: bool,
    pin: bool = False,
) -> Iterator[Batch]:
    """Every forward's batch from ``first_step`` to the end of the plan, read ahead by a thread."""
    lengths = np.asarray(cache.lengths)

    def load(epoch: int, ids: np.ndarray) -> Batch:
        samples = [cache[sample_id] for sample_id in ids.tolist()]
        anchors = [
            draw_anchors(sample.loss_mask, num_anchors, seed=config.seed, epoch=epoch, sample_id=sample_id)
            for sample_id, sample in zip(ids.tolist(), samples, strict=True)
        ]
        batch = collate(samples, anchors, block_size, with_last=with_last)
        return batch.pinned() if pin else batch

    wanted = (
        (plan.epoch(step), ids)
        for step in range(first_step, plan.total_steps)
        for ids in plan.micro_batches(step, config, lengths)
    )
    return _ahead(load, wanted)


def _ahead(load: Any, wanted: Iterable[tuple], depth: int = 2) -> Iterator[Batch]:
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting: collections.deque = collections.deque()
        for arguments in wanted:
            waiting.append(pool.submit(load, *arguments))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
