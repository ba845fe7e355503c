"""Run the target over all samples that a cache lacks: in this process and in helpers, each writing what it computes.

1. Lengths alone decide which samples share a forward (`cache.batches`) and where every byte lies, so whoever computes a
   batch writes it to its final place, and it does not show in the bytes who did.
2. Every process asks for the next batch when it is ready for one: a slow device takes fewer. One that streams the
   target's layers takes as many as its memory holds, a pass, and reads the weights once for all of them.
3. In each, a thread writes a batch while the target computes the next.
4. What is on the disk for certain is entered in the journal, by this process alone.
5. Of the ranks of several nodes each computes every n-th batch, with a journal of its own.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.cache.batches import batches
from nemotron_dspark.cache.writer import CacheWriter, ShardFiles, Written
from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.data.tokens import TokenStore
from nemotron_dspark.errors import CheckError, EnvironmentFault
from nemotron_dspark.processes import deaths_named, process_pool, share
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.spec import TargetSpec
from nemotron_dspark.targets.target import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LoadTarget = Callable[[], Target]  # for a helper it is pickled

_ENCODERS = 4  # threads that encode one batch beside a GPU, which computes faster than one of them encodes


@dataclasses.dataclass(frozen=True)
class TargetFacts:
    """What a build must know of a target before it is loaded; a loaded `Target` tells it too."""

    folder: Path
    spec: TargetSpec
    tokenizer: "PreTrainedTokenizerBase"
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class States:
    """Hidden states of a batch on the target's device, which may still be computing them.

    Rows are padded on the right; what they hold behind their sample is without meaning.
    """

    taps: Tensor  # bf16 [B, S, T·H]
    last: Tensor  # bf16 [B, S, H]
    finite: Tensor  # bool [B, S]
    real: Tensor  # bool [B, S], on the host: positions of tokens
    done: torch.cuda.Event | None  # on CUDA: when they are computed

    @contextlib.contextmanager
    def wait_stream(self) -> Iterator[None]:
        """Run the block on a stream that waits for these states alone, not for what the target is given later.

        For another thread than the target's.
        """
        if self.done is None:
            yield
            return
        stream = torch.cuda.Stream(self.taps.device)
        stream.wait_event(self.done)
        with torch.cuda.stream(stream):
            yield

    def check_finite(self, sample_ids: Sequence[int]) -> None:
        """`CheckError` when a hidden state of a real token is not finite; ``sample_ids`` of the rows, to name it."""
        broken = (~self.finite.cpu() & self.real).any(dim=1)  # [B]
        if broken.any():
            raise CheckError(
                f"The target's hidden states of sample {sample_ids[int(broken.nonzero()[0])]} are not finite.",
                "Load the target in another type (target.dtype=bfloat16 or float32).",
            )


def capture_states(
    target: Target,
    batches: Sequence[Sequence[Tokenised]],
    taps: tuple[int, ...],
    on_layer: Callable[[int], None] = lambda layer: None,
) -> Iterator[States]:
    """One forward over each of ``batches``. It needs no mask: no token sees a later one, and padding comes last.

    That is what the proof of causality shows on the loaded target; without a mask attention takes its fastest path.
    ``on_layer`` is called as `Target.captures` does.
    """
    padded = [_padded(samples, target.tokenizer.pad_token_id or 0) for samples in batches]
    sequences = [Sequences(ids, lengths=tuple(real.sum(1).tolist())) for ids, real in padded]
    found = target.captures(sequences, taps, on_layer)
    for captured, (_, real) in zip(found, padded, strict=True):
        tapped, last = captured.taps.to(torch.bfloat16), captured.last.to(torch.bfloat16)
        sums = tapped.sum(-1, dtype=torch.float32) + last.sum(-1, dtype=torch.float32)  # one that is not finite shows
        done = None
        if tapped.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(tapped.device))
        yield States(tapped, last, torch.isfinite(sums), real, done)


def _padded(samples: Sequence[Tokenised], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] padded on the right, and which of them are real [B, S]."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    input_ids = torch.full((len(samples), int(lengths.max())), pad, dtype=torch.long)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = torch.from_numpy(sample.input_ids)
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]


@dataclasses.dataclass(frozen=True)
class BuildProgress:
    """How far a build is; ``stage`` is "tokenise" (samples = lines read, totals 0) or "capture"."""

    stage: str
    samples: int
    total_samples: int
    tokens: int
    total_tokens: int
    layer: int | None = None  # that a pass is at, where the target's layers are streamed

    @staticmethod
    def of(writer: CacheWriter, layer: int | None = None) -> "BuildProgress":
        """The progress of the capture for ``writer``, on rank 0 of all ranks."""
        writer.gather()
        done, lengths = writer.written, writer.layout.lengths
        return BuildProgress(
            "capture", int(done.sum()), len(done), int(lengths[done].sum()), int(lengths.sum()), layer=layer
        )


@dataclasses.dataclass(frozen=True)
class CaptureBatch:
    """The samples of one forward of the target."""

    samples: list[int]  # longest first
    rows: list[int]  # of those that are not written yet

    def tokens(self, lengths: np.ndarray) -> int:
        """Padded tokens, of samples with ``lengths`` [samples]."""
        return len(self.samples) * int(lengths[self.samples[0]])


Batches = deque[CaptureBatch]  # still to be computed; any thread takes the next, and clears it to stop them all


def capture_all(
    load: LoadTarget,
    tokens: TokenStore,
    writer: CacheWriter,
    batch_tokens: int,
    on_progress: Callable[[BuildProgress], None],
    *,
    helpers: Sequence[LoadTarget] = (),
) -> tuple[str, ...]:
    """Compute and write this rank's part of the samples of ``tokens`` that ``writer`` does not have.

    Without any, nothing is loaded. ``load`` gives the target of this process; each of ``helpers`` loads the same one
    in a process of its own. Whatever stops it, samples whose forward has been run are written before it raises. Returns
    what the target remarks.

    Raises:
        CheckError: hidden states are not finite.
        EnvironmentFault: a forward does not fit into the memory, the disk is full, or a helper died.
    """

    def report(layer: int | None = None) -> None:
        on_progress(BuildProgress.of(writer, layer))

    missing = []
    for samples in batches(tokens.lengths, batch_tokens):
        if rows := np.flatnonzero(~writer.written[samples]).tolist():
            missing.append(CaptureBatch(samples, rows))
    queue = Batches(missing[writer.context.rank :: writer.context.world_size])
    if not queue:
        report()
        return ()
    threads = torch.get_num_threads() // (1 + len(helpers)) or 1
    share_of_each = sum(batch.tokens(tokens.lengths) for batch in queue) // (1 + len(helpers))
    with contextlib.ExitStack() as stack:
        given = (tokens, writer, queue, threads, share_of_each)
        waits = [stack.enter_context(_helper(helper, *given)) for helper in helpers]
        target = load()
        if helpers and target.device.type == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        with Pipeline(target, tokens, writer.files, writer.mark_written) as pipeline:
            most = min(target.pass_tokens(writer.files.layout.taps), share_of_each)
            for batches_of_a_pass in _passes(queue, tokens.lengths, most):
                pipeline.compute(batches_of_a_pass, on_layer=report)
                report()
        for wait in waits:
            wait()
    report()
    return target.remarks()


def _passes(queue: Batches, lengths: np.ndarray, most: int) -> Iterator[list[CaptureBatch]]:
    """Batches to be computed together: at least one, and further ones up to ``most`` padded tokens."""
    taken: list[CaptureBatch] = []
    held = 0
    with contextlib.suppress(IndexError):  # it is empty
        while True:
            if taken and held + queue[0].tokens(lengths) > most:
                yield taken
                taken, held = [], 0
            taken.append(queue.popleft())
            held += taken[-1].tokens(lengths)
    if taken:
        yield taken


class Pipeline:
    """Forwards of one target, each overlapped with the writing of the one before; use as a context manager.

    ``on_written`` is told in a thread what has become durable.
    """

    def __init__(self, target: Target, tokens: TokenStore, files: ShardFiles, on_written: Callable[[Written], None]):
        self._target, self._tokens, self._files, self._on_written = target, tokens, files, on_written
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] = self._writer.submit(lambda: None)
        self._encoders = ThreadPoolExecutor(_ENCODERS if target.device.type == "cuda" else 1, "encode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._writer.shutdown()  # what was computed is written, whatever happened
        self._encoders.shutdown()
        if kind is None:
            self._writing.result()

    def compute(self, batches: list[CaptureBatch], on_layer: Callable[[int], None] = lambda layer: None) -> None:
        """Run the forwards of a pass, each written while the next is run. Raises what an earlier writing did."""
        samples = [[self._tokens[sample] for sample in batch.samples] for batch in batches]
        states = capture_states(self._target, samples, self._files.layout.taps, on_layer)
        for batch, rows in zip(batches, samples, strict=True):
            try:
                captured = next(states)
            except torch.OutOfMemoryError:
                raise EnvironmentFault(
                    f"A forward of {len(rows)} samples of up to {len(rows[0].input_ids)} tokens does not fit into "
                    f"the memory of {self._target.device}.",
                    "Lower cache.batch_tokens or data.max_length, and build into another folder.",
                ) from None
            before, self._writing = self._writing, self._writer.submit(self._write, batch, rows, captured)
            before.result()
        for _ in states:  # none is left; a streamed pass puts its last layer away
            pass

    def _write(self, batch: CaptureBatch, samples: list[Tokenised], states: States) -> None:
        with states.wait_stream():
            states.check_finite(self._tokens.ids[batch.samples].tolist())

        def write_row(row: int) -> tuple[int, int]:
            sample, sample_id, length = samples[row], batch.samples[row], len(samples[row].input_ids)
            with states.wait_stream():
                taps, last = states.taps[row, :length], states.last[row, :length]
                return sample_id, self._files.write(sample_id, sample.input_ids, sample.loss_mask, taps, last)

        written = dict(self._encoders.map(write_row, batch.rows))
        self._files.flush()
        self._on_written(written)


@contextlib.contextmanager
def _helper(
    load: LoadTarget, tokens: TokenStore, writer: CacheWriter, queue: Batches, threads: int, most: int
) -> Iterator[Callable[[], None]]:
    """A process that computes batches of ``queue``, which a thread of this one hands to it.

    Yields a function that waits until it has written what it was given. It raises what the helper raised, or that it
    died.
    """
    shared = (load, tokens, writer.folder, writer.layout, threads)
    with process_pool(1, shared) as pool, ThreadPoolExecutor(1, "helper") as thread:
        process, loaded = pool.submit(os.getpid), pool.submit(_load_in_helper)
        fed = thread.submit(_feed, pool, loaded, writer, queue, tokens.lengths, most)
        try:
            yield lambda: fed.result() if loaded.done() else None
        finally:
            queue.clear()
            with contextlib.suppress(BrokenProcessPool, ProcessLookupError):
                if not loaded.done():  # it has computed nothing, and loading may take minutes
                    os.kill(process.result(), signal.SIGKILL)


def _feed(
    pool: ProcessPoolExecutor, loaded: Future[int], writer: CacheWriter, queue: Batches, lengths: np.ndarray, most: int
) -> None:
    try:
        with deaths_named("helps to compute"):
            passes = _passes(queue, lengths, min(loaded.result(), most))
            for batches_of_a_pass in itertools.chain(passes, [None]):
                writer.mark_written(pool.submit(_compute_in_helper, batches_of_a_pass).result())
    finally:
        queue.clear()  # after a failure; else it is empty


_pipeline: Pipeline  # in a helper's process
_written: deque[Written] = deque()  # likewise: what has become durable since it last told


def _load_in_helper() -> int:
    """Load the target; how many tokens of a pass it takes."""
    global _pipeline
    load, tokens, folder, layout, threads = share()
    target = load()
    if target.device.type == "cpu":
        torch.set_num_threads(threads)
    _pipeline = Pipeline(target, tokens, ShardFiles(folder, layout), _written.append)
    return target.pass_tokens(layout.taps)


def _compute_in_helper(batches_of_a_pass: list[CaptureBatch] | None) -> Written:
    """What has become durable meanwhile; everything when there is no batch any more."""
    if batches_of_a_pass is None:
        _pipeline.__exit__(None)
    else:
        _pipeline.compute(batches_of_a_pass)
    taken: Written = {}
    while _written:
        taken |= _written.popleft()
    return taken
