"""Which samples each optimiser step takes. Counted from 0, the step is all the position that a run has."""

import dataclasses
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.training.anchors import cycle_order, epoch_order


@dataclasses.dataclass(frozen=True)
class SampleSchedule:
    """Which samples each step takes: every epoch takes all of them once, in an order of its own."""

    num_samples: int
    steps_per_epoch: int  # a rest smaller than one global batch is left out of the epoch
    total_steps: int
    accumulation: int  # micro-batches per step and process
    rank: int  # of this process
    world_size: int

    @staticmethod
    def of(config: TrainConfig, num_samples: int, context: DistContext = SINGLE) -> "SampleSchedule":
        """The schedule for ``num_samples``; `InputError` when the batch sizes do not fit them or each other."""
        _check_batch_sizes(config, context.world_size)
        steps_per_epoch = num_samples // config.global_batch_size
        if not steps_per_epoch:
            raise InputError(
                f"The data has {num_samples} samples, but one optimiser step takes {config.global_batch_size}.",
                f"Add data, or set train.global_batch_size to at most {num_samples}.",
            )
        return SampleSchedule(
            num_samples,
            steps_per_epoch,
            config.max_steps or config.epochs * steps_per_epoch,
            config.global_batch_size // (config.local_batch_size * context.world_size),
            context.rank,
            context.world_size,
        )

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def sample_epoch(self, step: int) -> int:
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
        """Sample ids of each micro-batch of ``step`` in this process, longest first: memory is at its highest early.

        The processes take turns, so that all have about the same length at a time.
        """
        ids = self.samples(step, config)
        by_length = ids[np.argsort(-lengths[ids], kind="stable")]
        return np.split(by_length, self.accumulation * self.world_size)[self.rank :: self.world_size]


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Samples whose hidden states are on the disk at the same time, and the steps that take them.

    ``first_step`` tells segments apart.
    """

    first_step: int
    steps: int  # of one epoch of its samples
    epochs: int  # that it is used for, one after the other
    first_epoch: int
    ids: np.ndarray  # int64, ascending
    size: int  # bytes

    @property
    def stop_step(self) -> int:
        return self.first_step + self.steps * self.epochs


@dataclasses.dataclass(frozen=True, eq=False)
class RollingSchedule(SampleSchedule):
    """Takes the samples segment by segment, each for several epochs before the next. All of them once are a cycle.

    A segment is a number of whole global batches of at most half the budget: while one trains, the next is made. It is
    a function of sizes, seed and step alone, so any segment can be made again. Where the budget holds all samples there
    is one segment and its steps are those of `SampleSchedule`.
    """

    sizes: np.ndarray  # int64 [samples], bytes of each
    budget: int  # bytes
    beside: int  # bytes of it that are taken by what stays
    reuse: int  # epochs that a segment is used for
    epochs: int  # of the whole run
    seed: int
    _batch: int  # samples of one step
    _cycles: dict[int, list[Segment]] = dataclasses.field(default_factory=dict)

    @staticmethod
    def rolling(
        config: TrainConfig,
        sizes: np.ndarray,
        *,
        budget: int,
        beside: int = 0,
        reuse: int,
        context: DistContext = SINGLE,
    ) -> "RollingSchedule":
        """The schedule for samples of ``sizes`` bytes.

        Raises:
            InputError: the batch sizes do not fit the data, or a global batch does not fit into half the budget.
        """
        plain = SampleSchedule.of(config, len(sizes), context)
        room = budget - beside
        whole = int(sizes.sum()) <= room
        largest = int(np.sort(sizes)[-config.global_batch_size :].sum())
        if not whole and largest > room // 2:
            held = f" beside {beside / 1e9:.3g} GB of held-out samples" if beside else ""
            raise InputError(
                f"The longest samples of one optimiser step take {largest / 1e9:.3g} GB, more than half of "
                f"cache.budget_gb ({budget / 1e9:g}){held}.",
                f"Set cache.budget_gb to at least {(2.02 * largest + beside) / 1e9:.3g}, or lower "
                "train.global_batch_size.",
            )
        epochs = -(-plain.total_steps // plain.steps_per_epoch)
        return RollingSchedule(
            **vars(plain),
            sizes=sizes,
            budget=budget,
            beside=beside,
            reuse=epochs if whole else reuse,
            epochs=epochs,
            seed=config.seed,
            _batch=config.global_batch_size,
        )

    @property
    def whole(self) -> bool:
        """The budget holds all samples."""
        return int(self.sizes.sum()) <= self.room

    @property
    def room(self) -> int:
        """Bytes of the budget that are left for segments."""
        return self.budget - self.beside

    def segment(self, step: int) -> Segment:
        """The segment of ``step``."""
        segments = self._cycle(step // (self.steps_per_epoch * self.reuse))
        return next(segment for segment in segments if step < segment.stop_step)

    def segments(self, step: int) -> Iterator[Segment]:
        """The segment of ``step`` and all behind it."""
        while step < self.total_steps:
            segment = self.segment(step)
            yield segment
            step = segment.stop_step

    def sample_epoch(self, step: int) -> int:
        segment = self.segment(step)
        return segment.first_epoch + (step - segment.first_step) // segment.steps

    def must_save(self, step: int) -> bool:
        return super().must_save(step) or step == self.segment(step - 1).stop_step

    def samples(self, step: int, config: TrainConfig) -> np.ndarray:
        segment, size = self.segment(step), config.global_batch_size
        order = cached_order(len(segment.ids), self.seed, self.sample_epoch(step))
        first = (step - segment.first_step) % segment.steps * size
        return segment.ids[order[first : first + size]]

    def _cycle(self, number: int) -> list[Segment]:
        if number not in self._cycles:
            for old in [known for known in list(self._cycles) if known < number - 1]:
                self._cycles.pop(old, None)
            self._cycles[number] = self._segments_of(number)
        return self._cycles[number]

    def _segments_of(self, number: int) -> list[Segment]:
        groups = self._groups(number)
        first_epoch = number * self.reuse
        epochs = min(self.reuse, self.epochs - first_epoch)
        step, segments = first_epoch * self.steps_per_epoch, []
        for ids in groups:
            steps = self.steps_per_epoch if len(groups) == 1 else len(ids) // self._batch
            size = int(self.sizes[ids].sum())
            segments.append(Segment(step, steps, epochs, first_epoch, np.sort(ids), size))
            step = segments[-1].stop_step
        return segments

    def _groups(self, number: int) -> list[np.ndarray]:
        """Sample ids of each segment: as few segments as fit, as equal as whole steps allow."""
        if self.whole:
            return [np.arange(self.num_samples)]
        order = cycle_order(self.num_samples, seed=self.seed, number=number)
        steps = order[: self.steps_per_epoch * self._batch].reshape(self.steps_per_epoch, self._batch)
        per_step = self.sizes[steps].sum(axis=1)
        count = -(-int(per_step.sum()) // (self.room // 2))
        while any(part.sum() > self.room // 2 for part in np.array_split(per_step, count)):
            count += 1
        return [part.flatten() for part in np.array_split(steps, count)]


def most_processes(config: TrainConfig, gpus: int, nodes: int = 1) -> int:
    """Processes of a training on each of ``nodes``: one a GPU, as far as a step's micro-batches can be dealt out.

    Those that run the target alone (`train.inference_gpus`) are among them, and take none. 0 where the micro-batches
    cannot be dealt out to so many nodes.
    """
    micro_batches, apart = config.global_batch_size // config.local_batch_size, config.inference_gpus
    counts = range(max(1, gpus - apart), 0, -1)
    return next((count + apart for count in counts if micro_batches % (count * nodes) == 0), 0)


def _check_batch_sizes(config: TrainConfig, processes: int) -> None:
    whole, local = config.global_batch_size, config.local_batch_size
    if whole % local:
        raise InputError(
            f"train.global_batch_size {whole} is not a multiple of train.local_batch_size {local}.",
            "Change one of them.",
        )
    if config.window is not None and local > 1:
        raise InputError(
            f"train.window is set and train.local_batch_size is {local}: a long sample has a forward of its own.",
            "Set train.local_batch_size=1.",
        )
    together = local * processes
    if whole % together:
        sizes = [size for size in (whole // together * together, (whole // together + 1) * together) if size]
        counts = [count for count in range(1, processes) if whole // local % count == 0]
        raise InputError(
            f"train.global_batch_size {whole} is not a multiple of train.local_batch_size {local} x {processes} "
            "processes.",
            f"Set train.global_batch_size to {' or '.join(map(str, sizes))}, or start "
            f"{' or '.join(map(str, counts[-3:]))} processes.",
        )


@lru_cache(maxsize=2)
def cached_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(num_samples, seed=seed, epoch=epoch)
