"""From samples to the micro-batches of each optimiser step: a function of the seed and the step, nothing else."""

import collections
import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.training.anchors import LossSlots, draw_anchors, draw_stretch, loss_slots, unrolled_slots
from nemotron_dspark.training.schedule import SampleSchedule
from nemotron_dspark.training.source import SampleLike, Source

_CPU = torch.device("cpu")
_AHEAD = 2  # micro-batches made while one is trained on


@dataclasses.dataclass(frozen=True)
class Batch:
    """A micro-batch, with its blocks: samples padded on the right, or packed, one behind the other in one row."""

    input_ids: Tensor  # int64 [B, S]
    taps: Tensor  # [B, S, T·H]
    last: Tensor | None  # [B, S - far, H]; None when no loss term needs it
    anchors: Tensor  # int64 [B, A]
    block_mask: Tensor  # bool [B, A]; False: a filler
    slot_mask: Tensor  # bool [B, A, γ]; True: the slot carries loss
    slots: LossSlots  # those that count
    tokens: int  # without padding
    positions: Tensor | None = None  # int64 [B, S] of each token in its own sample; None: a row is one sample
    lengths: tuple[int, ...] | None = None  # of the samples of a packed row: the host need not read them off a device
    far: int = 0  # first positions of the row that only give context: no weight learns from them

    def to(self, device: torch.device) -> "Batch":
        """A copy on ``device``; to CUDA it is under way while the host goes on."""
        ahead = device.type == "cuda"  # copies to the host must be waited for
        moved = {
            field.name: value.to(device, non_blocking=ahead)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | LossSlots)
        }
        return dataclasses.replace(self, **moved)

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which CUDA copies by itself."""
        pinned = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), LossSlots)
            or (isinstance(value, Tensor) and value.device.type == "cpu")
        }
        return dataclasses.replace(self, **pinned)


def collate(
    samples: Sequence[SampleLike],
    anchors: Sequence[Tensor],  # per sample [≤ A]
    block_size: int,
    *,
    with_last: bool = True,
    slots_of: Callable[[Tensor, Tensor, int], Tensor] = loss_slots,
) -> Batch:
    """One batch; A is the largest number of anchors any of the samples has (at least 1).

    ``slots_of`` a sample's loss mask, its anchors and ``block_size`` says which slots carry loss.
    """
    width = max(1, *(len(drawn) for drawn in anchors))
    slot_mask = torch.zeros(len(samples), width, block_size, dtype=torch.bool)
    positions = torch.zeros(len(samples), width, dtype=torch.long)
    block_mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, (sample, drawn) in enumerate(zip(samples, anchors, strict=True)):
        positions[row, : len(drawn)] = drawn
        block_mask[row, : len(drawn)] = True
        slot_mask[row, : len(drawn)] = slots_of(sample.loss_mask, drawn, block_size)
    input_ids = pad_sequence([sample.input_ids for sample in samples], batch_first=True)
    return Batch(
        input_ids,
        pad_sequence([sample.taps for sample in samples], batch_first=True),
        pad_sequence([sample.last for sample in samples], batch_first=True) if with_last else None,
        positions,
        block_mask,
        slot_mask,
        LossSlots.of(positions, slot_mask, input_ids.shape[1]),
        sum(len(sample.input_ids) for sample in samples),
    )


def collate_packed(
    samples: Sequence[SampleLike],
    anchors: Sequence[Tensor],  # per sample [≤ A]
    block_size: int,
    *,
    with_last: bool = True,
    slots_of: Callable[[Tensor, Tensor, int], Tensor] = loss_slots,
) -> Batch:
    """The batch of `collate` without padding and fillers: all samples in one row, B = 1."""
    if not any(map(len, anchors)):  # fillers alone
        return collate(samples, anchors, block_size, with_last=with_last)
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    drawn = torch.cat([own + start for own, start in zip(anchors, starts, strict=True)])[None]
    slots = [slots_of(sample.loss_mask, own, block_size) for sample, own in zip(samples, anchors, strict=True)]
    slot_mask = torch.cat(slots)[None]
    return Batch(
        torch.cat([sample.input_ids for sample in samples])[None],
        torch.cat([sample.taps for sample in samples])[None],
        torch.cat([sample.last for sample in samples])[None] if with_last else None,
        drawn,
        torch.ones_like(drawn, dtype=torch.bool),
        slot_mask,
        LossSlots.of(drawn, slot_mask, sum(lengths)),
        sum(lengths),
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths=tuple(lengths),
    )


def collate_unrolled(samples: Sequence[SampleLike], steps: int, *, packed: bool = False) -> Batch:
    """A batch for EAGLE-3: the block of anchor i + 1 holds the unrolled steps of position i."""
    # Packed, the last position of a sample has a block as well, which counts nothing: so blocks are positions.
    anchors = [torch.arange(1, len(sample.input_ids) + packed) for sample in samples]
    return (collate_packed if packed else collate)(samples, anchors, steps, slots_of=unrolled_slots)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes a micro-batch from the ids of its samples."""

    source: Source
    schedule: SampleSchedule
    seed: int
    num_anchors: int
    block_size: int
    with_last: bool
    device: torch.device = _CPU  # where batches go
    unrolled: bool = False  # for EAGLE-3
    packed: bool = False
    window: int | None = None  # tokens of the stretch of a longer sample that is learnt from

    def __call__(self, step: int, ids: np.ndarray) -> Batch:
        samples = self.source.samples(ids.tolist(), step)
        if self.unrolled:
            batch = collate_unrolled(samples, self.block_size, packed=self.packed)
        else:
            epoch, far = self.schedule.sample_epoch(step), 0
            places = [{"seed": self.seed, "epoch": epoch, "sample_id": sample_id} for sample_id in ids.tolist()]
            drawn_from = [sample.loss_mask for sample in samples]
            if self.window is not None and len(drawn_from[0]) > self.window:  # there is one sample
                stretch = draw_stretch(drawn_from[0], self.window, **places[0])
                samples, far = [_with_stretch(samples[0], stretch, self.block_size)], stretch.start
                inside = torch.zeros_like(drawn_from[0])
                inside[stretch] = True
                drawn_from = [drawn_from[0] & inside]
            anchors = [
                draw_anchors(mask, self.num_anchors, **place) for mask, place in zip(drawn_from, places, strict=True)
            ]
            put = collate_packed if self.packed else collate
            batch = put(samples, anchors, self.block_size, with_last=self.with_last)
            batch = dataclasses.replace(batch, far=far)
        return batch.pinned() if self.device.type == "cuda" else batch  # copied while the GPU computes


@dataclasses.dataclass(frozen=True)
class _Part:
    """A sample up to the end of a stretch; nothing is predicted before it, so ``last`` begins with it."""

    input_ids: Tensor
    loss_mask: Tensor
    taps: Tensor
    last: Tensor


def _with_stretch(sample: SampleLike, stretch: slice, block_size: int) -> _Part:
    end = stretch.stop + block_size
    last = sample.last[stretch.start : end]
    return _Part(sample.input_ids[:end], sample.loss_mask[:end], sample.taps[:end], last)


def batches(load: Loader, config: TrainConfig, *, first_step: int, stopped: Sequence[object] = ()) -> Generator[Batch]:
    """Every micro-batch from ``first_step`` to the end of the schedule, read ahead by a thread.

    Ends early once ``stopped`` has an element, also while it waits for a batch.
    """
    schedule = load.schedule
    wanted = (
        (step, ids)
        for step in range(first_step, schedule.total_steps)
        for ids in schedule.micro_batches(step, config, load.source.lengths)
    )
    return _ahead(load, wanted, stopped)


def batch_bytes(rows: int, length: int, state_bytes: int) -> int:
    """Bytes of a micro-batch of ``rows`` samples of ``length`` tokens with ``state_bytes`` of hidden states each."""
    return rows * length * (state_bytes + 8)


def read_ahead_bytes(batch: int) -> int:
    """Bytes of micro-batches of ``batch`` bytes that are in main memory at a time."""
    return (1 + _AHEAD) * batch


def _ahead(load: Loader, wanted: Iterable[tuple[int, np.ndarray]], stopped: Sequence[object]) -> Generator[Batch]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=_use, initargs=(load.device,))
    try:
        waiting: collections.deque[Future[Batch]] = collections.deque()
        for step, ids in wanted:
            load.source.prefetch(ids.tolist(), step)
            waiting.append(pool.submit(load, step, ids))
            if len(waiting) > _AHEAD:
                if not _done(waiting[0], stopped):
                    return
                yield waiting.popleft().result()
        while waiting and _done(waiting[0], stopped):
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what it waits for may never come


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins with the machine's first, whichever its process uses


def _done(batch: Future[Batch], stopped: Sequence[object]) -> bool:
    """Wait for ``batch``; False when the run is stopped before."""
    while not wait([batch], timeout=0.2).done:
        if stopped:
            return False
    return True
