"""Where a run's samples come from: a finished cache, or the target itself while the draft trains."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.training.schedule import SampleSchedule


class SampleLike(Protocol):
    """What `cache.reader.Sample` holds."""

    @property
    def input_ids(self) -> Tensor: ...  # int64 [S]
    @property
    def loss_mask(self) -> Tensor: ...  # bool [S]
    @property
    def taps(self) -> Tensor: ...  # [S, T·H]
    @property
    def last(self) -> Tensor: ...  # [S, H]


class CacheLike(Protocol):
    """What training asks of a cache; `cache.reader.TargetCache` has it."""

    @property
    def lengths(self) -> np.ndarray: ...
    def input_ids(self, sample_id: int) -> Tensor: ...
    def loss_mask(self, sample_id: int) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, sample_id: int) -> SampleLike: ...


class Ended(Exception):
    """The run ends, here or on another rank, which says why: nothing more is to be made or waited for."""


class Source:
    """Samples by id. All but `samples` may stay as it is here; `samples` is called by the thread that reads ahead."""

    lengths: np.ndarray  # int [samples], tokens of each
    random_access = True  # any sample may be asked for at any step; else those of its step, and held-out ones

    @property
    def stopping(self) -> bool:
        """The process that computes the samples was told to stop, and this one is to stop with it."""
        return False

    def schedule(self, config: TrainConfig, context: DistContext = SINGLE) -> SampleSchedule:
        """Which samples each step takes; `InputError` when the batch sizes do not fit."""
        return SampleSchedule.of(config, len(self.lengths), context)

    def hold_out(self, ids: np.ndarray) -> None:
        """These samples are measured and never trained on."""

    def open(self, step: int) -> None:
        """Get ready to train from ``step`` on; not called where nothing is left to train."""

    def opening(self, sample_id: int) -> np.ndarray:
        """Token ids of the sample before its first answer."""
        raise NotImplementedError

    def prefetch(self, ids: Sequence[int], step: int) -> None:
        """The same samples will be asked for soon."""

    def samples(self, ids: Sequence[int], step: int) -> Sequence[SampleLike]:
        """The samples of one micro-batch of ``step``."""
        raise NotImplementedError

    def saved(self, step: int, *, last: bool) -> None:
        """A checkpoint after ``step`` steps is on the disk, the ``last`` one or not."""

    def close(self) -> None:
        """Stop whatever `open` has started."""


class CacheSource(Source):
    """A finished cache: nothing but reads."""

    def __init__(self, cache: CacheLike):
        self._cache = cache
        self.lengths = np.asarray(cache.lengths)

    def opening(self, sample_id: int) -> np.ndarray:
        ids, mask = self._cache.input_ids(sample_id), self._cache.loss_mask(sample_id)
        return np.asarray(ids)[: int(np.argmax(mask))]

    def samples(self, ids: Sequence[int], step: int) -> list[SampleLike]:
        return [self._cache[sample_id] for sample_id in ids]
