"""A rolling cache: while the draft trains on one segment of the samples, the target captures the next.

A segment is an ordinary target cache of the samples that `RollingSchedule` gives it. A kill leaves it to be finished,
and one that is gone can be made again, byte for byte; so a run's weights never depend on what was on the disk. A
segment goes when a checkpoint lies behind it.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

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
from nemotron_dspark.training.online import proven_target
from nemotron_dspark.training.schedule import RollingSchedule, Segment
from nemotron_dspark.training.source import Source

FOLDER = "segments"  # inside the run folder


class _Stopped(Exception):
    """The run ends; nothing more is to be made or waited for."""


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
        self._changed = threading.Condition()  # guards everything below
        self._on_disk: dict[int, Segment] = {}  # by first step; finished or being made
        self._ready: dict[int, TargetCache] = {}
        self._failure: BaseException | None = None
        self._stopped = False
        self._producer: threading.Thread | None = None

    def schedule(self, config: TrainConfig, context: DistContext = SINGLE) -> RollingSchedule:
        if context.world_size > 1:
            raise InputError(
                f"cache.mode=rolling makes its segments in one process, and there are {context.world_size}.",
                "Start one process, set cache.mode=online, or build a cache once with `nds cache build`.",
            )
        sizes = stored_bytes(
            self._cache,
            self.lengths,
            self._tokens.predicting,
            num_taps=len(self._taps),
            hidden_size=self._width,
        )
        self._schedule = RollingSchedule.rolling(
            config,
            sizes,
            budget=int(self._cache.budget_gb * 1e9),
            reuse=self._cache.reuse,
        )
        return self._schedule

    def open(self, step: int) -> None:
        kept = list(self._schedule.segments(step))[:2]
        self._remove_all_but(kept)
        with files.disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        missing = sum(segment.size for segment in kept) - _size(self._folder)
        check_space(
            self._folder,
            missing,
            "The hidden states need",
            "Free some space, give --out on another disk, or lower cache.budget_gb and begin a new run.",
        )
        self._target = proven_target(self._config, self._taps, self._on_status, load_for_capture)
        self._producer = threading.Thread(target=self._produce, args=(step,), name="segments")
        self._producer.start()

    def samples(self, ids: Sequence[int], step: int) -> list[Sample]:
        segment = self._schedule.segment(step)
        with self._changed:
            self._changed.wait_for(lambda: segment.first_step in self._ready or self._failure or self._stopped)
            if self._stopped:
                raise _Stopped
            if segment.first_step not in self._ready:
                raise self._failure or RuntimeError("a segment is neither there nor being made")
            cache = self._ready[segment.first_step]
        try:
            return [cache[place] for place in np.searchsorted(segment.ids, ids).tolist()]
        except InputError as error:
            again = f"Delete {self._path(segment)}; the same command makes it again."
            raise InputError(error.what, again) from None

    def saved(self, step: int) -> None:
        over = step >= self._schedule.total_steps
        with self._changed:
            done = [segment for segment in self._on_disk.values() if over or segment.stop_step <= step]
            for segment in done:
                self._ready.pop(segment.first_step, None)
        for segment in done:
            _remove(self._path(segment))
        with self._changed:  # only now is there room for the next
            for segment in done:
                del self._on_disk[segment.first_step]
            self._changed.notify_all()
        if over:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._producer is not None:
            self._producer.join()

    def _produce(self, step: int) -> None:
        try:
            for segment in self._schedule.segments(step):
                with self._changed:
                    self._changed.wait_for(lambda: len(self._on_disk) < 2 or self._stopped)
                    self._on_disk[segment.first_step] = segment
                cache = self._made(segment)
                with self._changed:
                    self._ready[segment.first_step] = cache
                    self._changed.notify_all()
        except _Stopped:
            pass
        except BaseException as error:  # is raised where the segment is waited for
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _made(self, segment: Segment) -> TargetCache:
        folder, tokens = self._path(segment), self._tokens.select(segment.ids)
        steps = f"steps {segment.first_step + 1}-{min(segment.stop_step, self._schedule.total_steps)}"

        def report(progress: BuildProgress) -> None:
            if self._stopped:
                raise _Stopped
            self._on_status(f"target, for {steps}: {progress.tokens / max(progress.total_tokens, 1):.0%}")

        if self._stopped:
            raise _Stopped
        if (folder / MANIFEST).is_file():
            shutil.rmtree(folder / WORK, ignore_errors=True)  # killed between the manifest and this
            try:
                return TargetCache(folder)
            except InputError as error:
                self._on_message(f"{error.what} It is made again.")
                _remove(folder)
        with (
            locked(folder / WORK),
            CacheWriter.of(
                folder,
                self._cache,
                tokens.lengths,
                tokens.predicting,
                taps=self._taps,
                hidden_size=self._width,
                extra={"target_model_name_or_path": self._config.name},
            ) as writer,
        ):
            capture_all(lambda: self._target, tokens, writer, self._cache.batch_tokens, report)
            writer.finish()
        self._on_status("")
        self._on_message(f"hidden states for {steps}: {len(tokens):,} samples, {files.size_text(segment.size)}.")
        return TargetCache(folder)

    def _path(self, segment: Segment) -> Path:
        return self._folder / f"step-{segment.first_step:08d}"

    def _remove_all_but(self, kept: Sequence[Segment]) -> None:
        names = {self._path(segment).name for segment in kept}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in names:
                _remove(path)


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
