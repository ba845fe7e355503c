"""Train a draft: micro-batches, one optimiser step, metrics, checkpoints; stop cleanly, go on exactly.

All that decides a step is the parameters, the optimiser's moments and the step's number. So a run killed anywhere goes
on from its newest checkpoint and ends in the same parameters as an undisturbed one, bit for bit on a CPU.

A step's micro-batches are dealt out to the processes. Their gradients are summed and divided once, by the weight of all
slots of the step; so neither the number of processes nor the size of a micro-batch changes more than the rounding.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.distributed import SINGLE, DistContext
from nemotron_dspark.drafts.dspark import Draft, DSparkDraft
from nemotron_dspark.drafts.eagle3 import Eagle3Draft
from nemotron_dspark.errors import CheckError, EnvironmentFault, NdsError
from nemotron_dspark.training.batches import Batch, Loader, batches
from nemotron_dspark.training.callbacks import Callback, Callbacks
from nemotron_dspark.training.checkpoints import (
    TrainState,
    damage,
    list_checkpoints,
    read_state,
    restore_parameters,
    save_checkpoint,
    step_folder,
)
from nemotron_dspark.training.eagle3_objective import Eagle3Objective
from nemotron_dspark.training.faults import samples_at_fault
from nemotron_dspark.training.loggers import MetricsLog, Tracker
from nemotron_dspark.training.metrics import MetricAccumulator, StepMetrics, StepSums
from nemotron_dspark.training.objective import EPSILON, DSparkObjective, LossWeights, Objective
from nemotron_dspark.training.optimiser import Optimiser, learning_rate
from nemotron_dspark.training.sharding import shard, uses_fsdp
from nemotron_dspark.training.source import CacheLike, CacheSource, Ended, Source
from nemotron_dspark.training.tiling import Tiling
from nemotron_dspark.training.validation import Validation, split


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One optimiser step, over all processes."""

    sums: StepSums
    lr: float
    grad_norm: float  # before clipping


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    steps: int  # optimiser steps of the whole run
    resumed_from: int  # step of the checkpoint this call started from; 0 = none
    tokens: int
    seconds: float
    last: StepMetrics | None  # last line written by this call
    checkpoint: Path  # to publish: of the last step, or of the one whose held-out samples were best


def objective_for(draft: Draft, config: TrainConfig, tiling: Tiling | None = None) -> Objective:
    """The objective of a draft of its kind."""
    if isinstance(draft, DSparkDraft):
        return DSparkObjective(draft, LossWeights.of(config, draft), tiling)
    if isinstance(draft, Eagle3Draft):
        return Eagle3Objective(draft, tiling)
    raise TypeError(f"there is no objective for {type(draft).__name__}")


class Trainer:
    """Trains ``draft`` in place to the end of the schedule, from the newest whole checkpoint in ``run_folder`` on.

    The draft holds the target's embeddings in the type to compute in, on the device to train on. Its other parameters
    are there too, unless they are to be sharded, and become fp32. ``tiling`` is the objective's; None: measured.
    Checkpoints go to ``run_folder/checkpoints``, metrics beside them. Whoever made ``source`` closes it.

    Raises:
        InputError: batch sizes, data and number of processes do not fit.
    """

    def __init__(
        self,
        source: Source | CacheLike,
        draft: Draft,
        config: TrainConfig,
        run_folder: Path,
        *,
        tiling: Tiling | None = None,
        callbacks: Iterable[Callback] = (),
        context: DistContext = SINGLE,
    ):
        whole = source if isinstance(source, Source) else CacheSource(source)
        self.source, held_out = split(whole, config.validation)
        self.schedule = self.source.schedule(config, context)
        self.validation = None
        if len(held_out):
            self.validation = Validation(held_out, whole, config, self.schedule.steps_per_epoch, run_folder)
        self.draft = draft
        self.config = config
        self.tiling = tiling
        self.context = context
        self.device = draft.embed_tokens.weight.device
        self.checkpoints = run_folder / "checkpoints"
        self.callbacks = Callbacks([*(_loggers(run_folder, config) if context.is_main else []), *callbacks])

    def run(self) -> TrainResult:
        """Train to the end of the schedule.

        Raises:
            InputError: the data turns out damaged; everything up to the last finished step is saved then, as with
                whatever else ends the reading of samples.
            CheckError: the loss is no longer finite; the parameters before that step are in the newest checkpoint.
            EnvironmentFault: the disk or the device's memory is full.
            KeyboardInterrupt: SIGINT or SIGTERM came; everything up to the last finished step is saved.
        """
        resumed_from = self._newest_checkpoint()
        if self.validation is not None:
            self.validation.resume(resumed_from, write=self.context.is_main)
        if self._over(resumed_from):
            self.source.saved(resumed_from, last=True)  # the call that finished may have been killed before it said so
            state = read_state(step_folder(self.checkpoints, resumed_from))
            return TrainResult(resumed_from, resumed_from, state.tokens, state.seconds, None, self._best(resumed_from))
        self._set_up(resumed_from)
        last = None
        try:
            self.callbacks.on_begin(self.schedule, self.step)
            with graceful_stop() as stopped:  # to the end of the last save: a rank may hear of a stop before its signal
                try:
                    feed = batches(self.load, self.config, first_step=self.step, stopped=stopped)
                    with contextlib.closing(feed) as self._feed:
                        while not self._over(self.step):
                            done = self.train_step(self._micro_batches(feed, stopped))
                            last = self._log(done) or last
                            if self._validate() or self._must_save():
                                self.save()
                except _Interrupted as stop:  # an unfinished step is done again; its gradients are not kept
                    self._save_and_raise(stop)
        finally:
            self.callbacks.on_end()
        self.draft.eval()
        if self.validation is not None:
            self.callbacks.on_message(self.validation.summary())
        return TrainResult(self.step, resumed_from, self.tokens, self._seconds(), last, self._best(self.step))

    def train_step(self, micro_batches: Iterable[Batch]) -> StepResult:
        """One optimiser step: forward and backward of each micro-batch, all-reduce, normalise, clip, update.

        Raises:
            CheckError: loss or gradients are not finite; nothing was updated.
        """
        sums = StepSums.zeros(self.draft.config.block_size, self.device)
        for done, batch in enumerate(micro_batches, start=1):
            with _memory_of(self.device):
                loss = self.objective(batch.to(self.device))
                loss.total.backward()
            sums += loss.sums
            self.callbacks.on_micro_batch(self.step, done)
        sums = StepSums.from_tensor(self.context.all_reduce_sum(sums.to_tensor()))
        weight = float(sums.weight) + EPSILON
        self.optimiser.normalise(weight, self.context)
        grad_norm = self.optimiser.clip(self.config.max_grad_norm)
        if not (math.isfinite(grad_norm) and math.isfinite(float(sums.loss))):
            raise self._not_finite(float(sums.loss) / weight, grad_norm)
        lr = learning_rate(self.step, self.schedule.total_steps, self.config)
        self.optimiser.step(lr)
        self.step += 1
        self.tokens += int(sums.tokens)
        self.callbacks.on_step_end(self.step)
        return StepResult(sums, lr, grad_norm)

    def save(self) -> None:
        """Write a checkpoint of the steps that are done, unless there is one."""
        if self._saved == self.step:
            return
        state = TrainState(self.step, self.tokens, self._seconds(), self.metrics.sums)
        wanted = self.context.is_main
        kept = self.optimiser.parameters(wanted=wanted), self.optimiser.moments(wanted=wanted)
        if self.draft.d2t is not None:
            kept[0]["d2t"] = self.draft.d2t
        if wanted:
            best = self.validation.best if self.validation is not None else None
            folder = save_checkpoint(
                self.checkpoints,
                self.draft.config,
                *kept,
                state,
                self.config.keep_checkpoints,
                best["step"] if best else None,
            )
            self.callbacks.on_checkpoint(self.step, folder)
        self.context.barrier()  # torchrun ends all processes when one has ended, also the one that writes
        self._saved = self.step
        self.source.saved(self.step, last=self._over(self.step))

    def _save_and_raise(self, stop: "_Interrupted") -> NoReturn:
        """Save the finished steps, then raise what ended the run; of several ranks one raises a failure."""
        self.save()
        if stop.failure is not None:
            raise _stopped_by(stop.failure, self.step) from stop.failure
        if stop.elsewhere:
            self.context.barrier()  # does not come back from here: another rank raises
        raise KeyboardInterrupt from None

    def _set_up(self, step: int) -> None:
        """Make everything that a step needs, as it was after ``step`` steps."""
        draft, config = self.draft, self.config
        for parameter in draft.trainable_parameters().values():
            parameter.data = parameter.data.float()
        state, moments = TrainState(0, 0, 0.0, StepSums.zeros(draft.config.block_size)), None
        if step:
            state = read_state(step_folder(self.checkpoints, step))
            moments = restore_parameters(step_folder(self.checkpoints, step), draft)
        self.objective = objective_for(draft, config, self.tiling)
        if uses_fsdp(config, self.context):
            shard(self.objective, draft, self.device, self.context)
        self.optimiser = Optimiser(draft.trainable_parameters(), config)
        if moments is not None:
            self.optimiser.restore(moments, step)
        self.source.open(step)
        self.step = self._saved = step
        self.tokens, self._seconds_before, self._started = state.tokens, state.seconds, time.monotonic()
        self.metrics = MetricAccumulator(state.sums)
        self.load = Loader(
            self.source,
            self.schedule,
            config.seed,
            self.objective.num_anchors,
            draft.config.block_size,
            with_last=self.objective.needs_target,
            device=self.device,
            unrolled=self.objective.unrolled,
            packed=config.packed,
            window=config.window,
        )
        draft.train()

    def _micro_batches(self, feed: Generator[Batch], stopped: list[int]) -> Iterator[Batch]:
        """The micro-batches of a step in this process, each once all ranks have agreed to go on."""
        for _ in range(self.schedule.accumulation):
            batch, failure = None, None
            try:
                batch = next(feed, None)  # None: stopped while waiting for it
            except NdsError as error:  # a damaged cache, say, whatever was read of it before
                failure = error
            except Ended:  # another rank's failure, of which that one votes
                pass
            votes = torch.tensor([bool(stopped) or self.source.stopping, failure is not None])
            stops, failures = self.context.all_reduce_sum(votes).tolist()
            if stops or failures or batch is None:
                raise _Interrupted(failure, elsewhere=bool(failures))
            yield batch

    def _over(self, step: int) -> bool:
        early = self.validation is not None and self.validation.exhausted
        return step >= self.schedule.total_steps or early

    def _must_save(self) -> bool:
        return self.step % self.config.checkpoint_every == 0 or self.schedule.must_save(self.step)

    def _validate(self) -> bool:
        """Measure the held-out samples if it is time to; the checkpoint of such a step is saved, it may be the best."""
        if self.validation is None or not self.validation.due(self.step, self.schedule.total_steps):
            return False
        found = self.validation.measure(self.objective, self.load, self.step, self.context)
        self.callbacks.on_validation(found.metrics, found.best)
        return True

    def _best(self, last: int) -> Path:
        """The checkpoint to publish."""
        best = self.validation.best if self.validation is not None else None
        return step_folder(self.checkpoints, best["step"] if best else last)

    def _log(self, done: StepResult) -> StepMetrics | None:
        self.metrics.add(done.sums)
        if self.step % self.config.log_every and self.step != self.schedule.total_steps:
            return None
        metrics = self.metrics.summary(
            measured=self.objective.measured,
            step=self.step,
            epoch=self.schedule.epoch(self.step - 1),
            lr=done.lr,
            grad_norm=done.grad_norm,
        )
        self.callbacks.on_metrics(metrics)
        self.metrics = MetricAccumulator(StepSums.zeros(self.draft.config.block_size))
        return metrics

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _newest_checkpoint(self) -> int:
        """Step of the newest checkpoint that is whole, 0 for none; a damaged one is passed over and said."""
        step = 0
        for checkpoint in reversed(list_checkpoints(self.checkpoints)) if self.context.is_main else ():
            fault = damage(checkpoint)
            if not fault:
                step = read_state(checkpoint).step
                break
            self.callbacks.on_message(f"Checkpoint {checkpoint.name} is passed over: {fault}.")
        return int(self.context.all_reduce_sum(torch.tensor(float(step))))

    def _not_finite(self, loss: float, grad_norm: float) -> CheckError:
        self._feed.close()  # the samples are read once more, one by one
        found = samples_at_fault(self.objective, self.load, self.step, self.config, self.device, self.context)
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
        there = list_checkpoints(self.checkpoints)
        kept = f"{there[-1]} is the last good checkpoint" if there else "there was no checkpoint yet"
        again = "train into another --out with a lower train.lr or max_grad_norm."
        if not found or len(found) == self.config.global_batch_size:
            where = " in every sample" if found else ", in no sample alone"
            return CheckError(f"Training stopped at step {self.step + 1}: {what}{where}; {kept}.", again.capitalize())
        named = ", ".join(map(str, found[:10])) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
        where = f"sample{'s' if len(found) > 1 else ''} {named}"
        return CheckError(
            f"Training stopped at step {self.step + 1}: {what} because of {where}; {kept}.",
            f"Check the cache with `nds cache verify`, and what stands there in the data; if both are sound, {again}",
        )


def _loggers(run_folder: Path, config: TrainConfig) -> list[Callback]:
    log: Callback = MetricsLog(run_folder)
    return [log, Tracker(config.tracker, run_folder, config.model_dump())] if config.tracker else [log]


class _Interrupted(Exception):
    """The step cannot go on: a signal came, or reading samples failed, here or on another rank."""

    def __init__(self, failure: NdsError | None, *, elsewhere: bool):
        self.failure = failure
        self.elsewhere = elsewhere


def _stopped_by(failure: NdsError, step: int) -> NdsError:
    kept = "Everything until then is saved." if step else "No step was finished."
    return type(failure)(f"Training stopped after step {step}: {failure.what}", f"{failure.do} {kept}")


@contextlib.contextmanager
def _memory_of(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise EnvironmentFault(
            f"A forward and backward of the draft do not fit into the memory of {device}.",
            "Lower train.local_batch_size, set train.activation_checkpointing=true, or on several GPUs "
            "train.parallel=fsdp; fewer train.num_anchors make another training.",
        ) from None


@contextlib.contextmanager
def graceful_stop() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list instead of being interrupted; a second one interrupts at once."""
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before: dict[int, Callable | int | None] = {
        number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
