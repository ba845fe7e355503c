"""A rolling cache: while the draft trains on one segment of the samples, the target captures the next.

A segment is an ordinary target cache of the samples that `RollingSchedule` gives it. A kill leaves it to be finished,
and one that is gone can be made again, byte for byte; so a run's weights never depend on what was on the disk. A
segment goes when a checkpoint lies behind it. Held-out samples are one more of them, which stays.

Of several ranks each has the target and captures a part of every segment, as machines that build one cache do. What one
of them does only when all are ready, and that all of them stop, they agree on over a connection of their own.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nemotron_dspark import files
from nemotron_dspark.cache.capture import BuildProgress, capture_all
from nemotron_dspark.cache.layout import MANIFEST, WORK
from nemotron_dspark.cache.needs import stored_bytes
from nemotron_dspark.cache.reader import Sample, TargetCache
from nemotron_dspark.cache.writer import CacheWriter
from nemotron_dspark.config import CacheConfig, TargetConfig, TrainConfig
from nemotron_dspark.data.tokens import TokenStore
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.errors import InputError
from nemotron_dspark.folders import check_space, locked
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.streamed import load_for_capture
from nemotron_dspark.training.online import on_own_device, proven_target
from nemotron_dspark.training.schedule import RollingSchedule, Segment
from nemotron_dspark.training.source import Ended, Source

FOLDER = "segments"  # inside the run folder
HELD_OUT = -1  # the first step of the segment that is only measured
_PATIENCE = 600  # seconds


class RollingSource(Source):
    """Samples out of the segment of a step; a thread captures the segments in their order, two on the disk at most."""

    random_access = False

    def __init__(
        self,
        folder: Path,
        tokens: TokenStore,
        target: TargetConfig,
        spec: TargetSpec,
        taps: tuple[int, ...],
        cache: CacheConfig,
        *,
        on_message: Callable[[str], None] = lambda text: None,
        on_status: Callable[[str], None] = lambda text: None,
    ):
        self.lengths = tokens.lengths
        self._folder = folder
        self._tokens = tokens
        self._config = target
        self._taps = taps
        self._width = spec.hidden_size
        self._cache = cache
        self._on_message = on_message
        self._on_status = on_status
        self._trained, self._held_out = tokens.ids, tokens.ids[:0]
        self._changed = threading.Condition()  # guards everything below
        self._on_disk: dict[int, Segment] = {}  # by first step; finished or being made
        self._ready: dict[int, TargetCache] = {}
        self._failure: BaseException | None = None
        self._stopped = False
        self._remarked = False  # what the target has to say of its speed is said once
        self._producer: threading.Thread | None = None

    def opening(self, sample_id: int) -> np.ndarray:
        return self._tokens.opening(sample_id)

    def hold_out(self, ids: np.ndarray) -> None:
        self._held_out = ids
        self._trained = np.setdiff1d(self._tokens.ids, ids)

    def schedule(self, config: TrainConfig, context: DistContext = SINGLE) -> RollingSchedule:
        sizes = stored_bytes(
            self._cache,
            self.lengths,
            self._tokens.predicting,
            num_taps=len(self._taps),
            hidden_size=self._width,
        )
        self._context = self._run = context
        self._schedule = RollingSchedule.rolling(
            config,
            sizes[self._trained],
            budget=int(self._cache.budget_gb * 1e9),
            beside=int(sizes[self._held_out].sum()),
            reuse=self._cache.reuse,
            context=context,
        )
        self._held = Segment(HELD_OUT, 0, 0, 0, self._held_out, self._schedule.beside)
        return self._schedule

    def open(self, step: int) -> None:
        with self._run.main_process_first():
            if self._run.is_main:
                kept = [*self._schedule.segments(step)][:2]
                self._make_room([self._held, *kept] if len(self._held.ids) else kept)
        self._context = self._run.apart()
        own = on_own_device(self._config, self._run)
        self._target = proven_target(own, self._taps, self._on_status, load_for_capture)
        self._producer = threading.Thread(target=self._produce, args=(step,), name="segments", daemon=True)
        self._producer.start()

    def samples(self, ids: Sequence[int], step: int) -> list[Sample]:
        held = np.isin(ids, self._held_out).all()
        segment = self._held if held else self._schedule.segment(step)
        numbers = ids if held else np.searchsorted(self._trained, ids)
        with self._changed:
            self._changed.wait_for(lambda: segment.first_step in self._ready or self._failure or self._stopped)
            if self._stopped:
                raise Ended
            if segment.first_step not in self._ready:
                raise self._failure or RuntimeError("a segment is neither there nor being made")
            cache = self._ready[segment.first_step]
        try:
            return [cache[place] for place in np.searchsorted(segment.ids, numbers).tolist()]
        except InputError as error:
            again = f"Delete {self._path(segment)}; the same command makes it again."
            raise InputError(error.what, again) from None

    def saved(self, step: int, *, last: bool) -> None:
        with self._changed:
            done = [segment for segment in self._on_disk.values() if segment.stop_step <= step]
            for segment in done:
                self._ready.pop(segment.first_step, None)
        for segment in done if self._run.is_main else ():
            _remove(self._path(segment))
        with self._changed:  # only now is there room for the next
            for segment in done:
                del self._on_disk[segment.first_step]
            self._changed.notify_all()
        if last:
            self.close()  # when it has ended here, no other rank writes any more
            if self._run.is_main:
                shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._producer is not None:  # it may wait for a rank that gives no sign of life
            self._producer.join(None if self._run.world_size == 1 else _PATIENCE)

    def _produce(self, step: int) -> None:
        try:
            if self._target.device.type == "cuda":
                torch.cuda.set_device(self._target.device)  # a thread begins with the machine's first
            if len(self._held.ids):
                self._make(self._held, self._held.ids, f"{len(self._held.ids):,} held-out samples")
            for segment in self._schedule.segments(step):
                self._together(lambda segment=segment: self._wait_for_room(segment))
                last = min(segment.stop_step, self._schedule.total_steps)
                self._make(segment, self._trained[segment.ids], f"steps {segment.first_step + 1}-{last}")
        except BaseException as error:  # is raised where the segment is waited for
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _together(self, work: Callable[[], bool | None]) -> bool:
        """Do ``work``, and wait until all ranks have done it; whether it was true on one of them.

        When it fails on one of them, or that one ends, all leave here: none is left waiting for another.

        Raises:
            Ended: on the others.
        """
        done, failure = False, None
        try:
            if self._stopped:
                raise Ended
            done = bool(work())
        except BaseException as error:
            failure = error
        true, failures = self._context.all_reduce_sum(torch.tensor([done, failure is not None])).tolist()
        if failure is not None:
            raise failure
        if failures:
            raise Ended
        return bool(true)

    def _wait_for_room(self, segment: Segment) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._on_disk) < 2 or self._stopped)
            self._on_disk[segment.first_step] = segment

    def _make(self, segment: Segment, ids: np.ndarray, said: str) -> None:
        """Make ``segment`` of the samples ``ids``, which are ``said`` to be for something, unless it is there."""
        folder, main = self._path(segment), self._context.is_main
        if not self._together(lambda: main and self._is_whole(folder)):
            self._capture(folder, ids, said)
            self._on_message(f"hidden states for {said}: {len(ids):,} samples, {files.size_text(segment.size)}.")

        def read() -> None:
            with self._changed:
                self._ready[segment.first_step] = TargetCache(folder)
                self._changed.notify_all()

        self._together(read)

    def _is_whole(self, folder: Path) -> bool:
        """Whether the segment in ``folder`` is finished; one that is damaged is removed."""
        if not (folder / MANIFEST).is_file():
            return False
        shutil.rmtree(folder / WORK, ignore_errors=True)  # killed between the manifest and this
        try:
            TargetCache(folder)
        except InputError as error:
            self._on_message(f"{error.what} It is made again.")
            _remove(folder)
            return False
        return True

    def _capture(self, folder: Path, ids: np.ndarray, said: str) -> None:
        """Capture the samples ``ids`` into ``folder``, this rank its part of them."""
        tokens, main, writing = self._tokens.select(ids), self._context.is_main, contextlib.ExitStack()
        writers: list[CacheWriter] = []

        def report(progress: BuildProgress) -> None:
            if self._stopped:
                raise Ended
            self._on_status(f"target, for {said}: {progress.tokens / max(progress.total_tokens, 1):.0%}")

        def open_writer() -> None:
            if main:
                writing.enter_context(locked(folder / WORK))
            writer = CacheWriter.of(
                folder,
                self._cache,
                tokens.lengths,
                tokens.predicting,
                taps=self._taps,
                hidden_size=self._width,
                extra={"target_model_name_or_path": self._config.name},
                context=self._context,
            )
            writers.append(writing.enter_context(writer))

        def capture() -> None:
            remarks = capture_all(lambda: self._target, tokens, writers[0], self._cache.batch_tokens, report)
            for remark in remarks if not self._remarked else ():
                self._on_message(remark)
            self._remarked |= bool(remarks)

        def finish() -> None:
            writers[0].gather()
            writers[0].finish()

        with writing:
            self._together(lambda: open_writer() if main else None)
            self._together(lambda: open_writer() if not main else None)
            self._together(capture)
            self._together(lambda: finish() if main else None)
        self._on_status("")

    def _path(self, segment: Segment) -> Path:
        return self._folder / ("held-out" if segment.first_step == HELD_OUT else f"step-{segment.first_step:08d}")

    def _make_room(self, kept: Sequence[Segment]) -> None:
        """Remove other segments than ``kept``, for which there must be space."""
        names = {self._path(segment).name for segment in kept}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in names:
                _remove(path)
        with files.disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        check_space(
            self._folder,
            sum(segment.size for segment in kept) - _size(self._folder),
            "The hidden states need",
            "Free some space, give --out on another disk, or lower cache.budget_gb and begin a new run.",
        )


def _remove(folder: Path) -> None:
    """Remove a segment; a kill leaves it whole or under a name that is never looked for."""
    gone = folder.with_name(f".{folder.name.removeprefix('.')}")
    if folder != gone:
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
