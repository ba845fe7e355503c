"""The forwards of a build: shared by processes, and in each of them overlapped with the writing of those before.

This process tokenises, computes with the target it has, keeps the journal and puts shards in place. Every helper is a
process with a target of its own. All ask for the next batch when they are ready for it, and write what they compute to
its place themselves; helpers then tell what is durable.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from nemotron_dspark.cache.batches import cut, window_stop
from nemotron_dspark.cache.capture import CapturesStates, States, capture_states
from nemotron_dspark.cache.layout import WORK, Layout
from nemotron_dspark.cache.tokens import Tokens, TokenStore
from nemotron_dspark.cache.writer import CacheWriter, ShardFiles
from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.processes import Child

LayOut = Callable[[Tokens, int], Layout]  # of the first so many samples
LoadTarget = Callable[[], CapturesStates]  # picklable: it is called in another process

_MORE, _DONE = "more", "done"  # what a helper says beside the checksums of what it has written
_WRITERS = 4  # threads that encode and write one batch beside a GPU, which computes faster than one of them writes


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: list[int]  # the samples of one forward
    missing: list[int]  # those of them that are not written yet
    known: int  # samples that the layout reaches


class Work:
    """Batches that are still to be computed; any thread may ask for the `next`."""

    def __init__(
        self,
        tokens: Tokens,
        writer: CacheWriter,
        batch_tokens: int,
        lay_out: LayOut | None,
        check_space: Callable[[Tokens, CacheWriter], None],
    ):
        self.failure: BaseException | None = None  # of whoever computes, the first one
        self._tokens = tokens
        self._writer = writer
        self._batch_tokens = batch_tokens
        self._lay_out = lay_out
        self._check_space = check_space
        self._stopped = False
        self._asking = threading.Lock()
        self._batches = self._in_order()

    def next(self) -> Batch | None:
        """The next batch, once its samples are tokenised; None when there are no more, or after `stop`."""
        with self._asking:
            return None if self._stopped else next(self._batches, None)

    def stop(self, failure: BaseException | None = None) -> None:
        """Give out no more batches; because of ``failure``, if there is one."""
        self.failure = self.failure or failure
        self._stopped = True
        self._tokens.stop()

    def _in_order(self) -> Iterator[Batch]:
        first = 0
        while (stop := self._window(first)) > first and not self._stopped:
            self._reach(stop)
            for ids in cut(self._tokens.lengths, first, stop, self._batch_tokens):
                if missing := [sample for sample in ids if not self._writer.written[sample]]:
                    yield Batch(ids, missing, len(self._writer.written))
            first = stop

    def _window(self, first: int) -> int:
        while True:
            stop = window_stop(self._tokens.lengths, first, self._batch_tokens)
            if stop or self._tokens.complete or self._stopped:
                return stop or len(self._tokens)
            self._tokens.wait(len(self._tokens) + 1)

    def _reach(self, stop: int) -> None:
        """Let the writer's layout reach so many samples. A shard is laid out when tokenising has passed its end."""
        while len(self._writer.written) < stop and not self._stopped:
            known = len(self._tokens)
            layout = self._lay_out(self._tokens, known)
            if not self._tokens.complete:
                known = int((layout.shards < layout.shards[-1]).sum())
            if known >= stop:
                self._writer.extend(layout if known == len(self._tokens) else self._lay_out(self._tokens, known))
                self._check_space(self._tokens, self._writer)
            else:
                self._tokens.wait(len(self._tokens) + 1)


def share(
    work: Work,
    target: CapturesStates,
    taps: tuple[int, ...],
    tokens: Tokens,
    writer: CacheWriter,
    report: Callable[[], None],
    *,
    lay_out: LayOut | None = None,
    helpers: Sequence[LoadTarget] = (),
) -> None:
    """Return when all of ``work`` is written; ``report`` is called now and then, in this thread.

    Whatever stops it, samples whose forward has been run are written before it raises.
    """
    with contextlib.ExitStack() as stack:
        served = []
        for load in helpers:
            child = stack.enter_context(Child("that helps to compute", _help, load, taps, writer.folder, lay_out))
            served.append(_Served(child, work, writer))
        try:
            _compute(target, taps, tokens, writer.files, _asked(work, report), writer.enter)
        finally:
            work.stop()
            for helper in served:
                helper.wait(report)
    if work.failure is not None:
        raise work.failure
    report()


def _asked(work: Work, report: Callable[[], None]) -> Iterator[Batch]:
    while (batch := work.next()) is not None:
        yield batch
        report()


def _compute(
    target: CapturesStates,
    taps: tuple[int, ...],
    tokens: Tokens,
    files: ShardFiles,
    batches: Iterable[Batch],
    enter: Callable[[dict[int, int]], None],
) -> None:
    """Run the target over ``batches``; ``enter`` is told the checksums of samples that are durable, in a thread."""
    threads = _WRITERS if target.device.type == "cuda" else 1
    with ThreadPoolExecutor(threads, "encode") as pool:

        def write(batch: Batch, samples: list[Tokenised], states: States) -> None:
            with states.reading():
                states.check_finite(tokens.ids[batch.ids])
            missing = set(batch.missing)

            def write_row(row: int) -> int:
                sample, length = samples[row], len(samples[row].input_ids)
                with states.reading():
                    return files.write(
                        batch.ids[row],
                        sample.input_ids,
                        sample.loss_mask,
                        states.taps[row, :length],
                        states.last[row, :length],
                    )

            rows = [row for row, sample_id in enumerate(batch.ids) if sample_id in missing]
            checksums = list((pool.map if threads > 1 else map)(write_row, rows))
            files.flush()
            enter({batch.ids[row]: checksum for row, checksum in zip(rows, checksums, strict=True)})

        with _Behind(write) as behind:
            for batch in batches:
                samples = [tokens[sample_id] for sample_id in batch.ids]
                behind.give(batch, samples, _forward(target, samples, taps))


def _forward(target: CapturesStates, samples: Sequence[Tokenised], taps: tuple[int, ...]) -> States:
    try:
        return capture_states(target, samples, taps)
    except torch.OutOfMemoryError:
        raise EnvironmentFault(
            f"A forward of {len(samples)} samples of up to {len(samples[0].input_ids)} tokens does not fit into the "
            f"memory of {target.device}.",
            "Lower cache.batch_tokens or data.max_length, and build into another folder.",
        ) from None


class _Behind:
    """A thread that does what it is given, in order; at most one thing waits. Leaving it waits for all."""

    def __init__(self, do: Callable[..., None]):
        self._do = do
        self._given: queue.Queue[tuple | None] = queue.Queue(1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._given.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def give(self, *things: Any) -> None:
        """Raises what it raised before."""
        self._raise()
        self._given.put(things)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (things := self._given.get()) is not None:
            if self._failure is None:
                try:
                    self._do(*things)
                except BaseException as error:  # is raised where more is given
                    self._failure = error
            del things  # hidden states: their memory is wanted while this waits


class _Served(threading.Thread):
    """What this process does for one helper."""

    def __init__(self, child: Child, work: Work, writer: CacheWriter):
        super().__init__(name="helper")
        self._child = child
        self._work = work
        self._writer = writer
        self._asked = self._dismissed = False
        self.start()

    def run(self) -> None:
        try:
            while (message := self._child.receive()) != _DONE:
                if message == _MORE:
                    self._asked = True
                    self._child.send(self._work.next())
                else:
                    self._writer.enter(message)
        except BaseException as error:
            if not self._dismissed:
                self._work.stop(error)

    def wait(self, report: Callable[[], None]) -> None:
        """Until it has written what it was given, after `Work.stop`; one that never asked has nothing to write."""
        if not self._asked:
            self._dismissed = True
            self._child.kill()
        while self.is_alive():
            self.join(0.5)
            report()


def _help(pipe: Connection, load: LoadTarget, taps: tuple[int, ...], folder: Path, lay_out: LayOut) -> None:
    """A helper's process."""
    target = load()
    tokens, files = TokenStore(folder / WORK, 0), ShardFiles(folder)
    saying = threading.Lock()

    def say(message: Any) -> None:
        with saying:
            pipe.send(message)

    def given() -> Iterator[Batch]:
        while True:
            say(_MORE)
            if (batch := pipe.recv()) is None:
                return
            if len(tokens) < batch.known:
                tokens.grow(batch.known)
                files.layout = lay_out(tokens, batch.known)
            yield batch

    _compute(target, taps, tokens, files, given(), say)
    say(_DONE)
