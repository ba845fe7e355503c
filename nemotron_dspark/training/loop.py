"""The training loop: accumulate, clip, step, log, save; stop cleanly, go on exactly.

All that decides a step is the weights, the optimiser's moments and the step's number. So a run killed anywhere goes on
from its newest checkpoint and ends in the same weights as an undisturbed one, bit for bit on a CPU.

A step's forwards are dealt out to the processes. What they add up to is divided once, by the weight of all slots of the
step; so neither the number of processes nor the size of a forward changes more than the rounding.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nemotron_dspark.config import TrainConfig
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.errors import CheckError, EnvironmentFault, NdsError
from nemotron_dspark.training.batches import Loader, batches
from nemotron_dspark.training.checkpoints import (
    Progress,
    damage,
    list_checkpoints,
    read_progress,
    restore_weights,
    save_checkpoint,
    step_folder,
)
from nemotron_dspark.training.faults import samples_at_fault
from nemotron_dspark.training.metrics import MetricsLog, StepMetrics, Window
from nemotron_dspark.training.objective import EPSILON, LossWeights, Objective
from nemotron_dspark.training.optimiser import MasterAdamW, learning_rate
from nemotron_dspark.training.plan import Plan
from nemotron_dspark.training.ranks import ALONE, Ranks
from nemotron_dspark.training.sharding import shard, shards
from nemotron_dspark.training.source import CacheLike, CacheSource, Source
from nemotron_dspark.training.step_sums import StepSums


class Watcher:
    """What the loop tells while it runs; a display overrides what it shows."""

    def begin(self, plan: Plan, first_step: int) -> None: ...
    def forward(self, step: int, done: int) -> None: ...
    def metrics(self, metrics: StepMetrics) -> None: ...
    def note(self, text: str) -> None: ...
    def working(self, text: str) -> None:
        """What goes on beside the steps or before them, in a few words; from any thread, often."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    steps: int  # optimiser steps of the whole run
    resumed_from: int  # step of the checkpoint this call started from; 0 = none
    tokens: int
    seconds: float
    last: StepMetrics | None  # last line written by this call
    checkpoint: Path  # holds the weights of the last step


def train(
    source: Source | CacheLike,
    draft: DSparkDraft,
    config: TrainConfig,
    run_folder: Path,
    *,
    watcher: Watcher | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train ``draft`` in place to the end of the plan, from the newest whole checkpoint in ``run_folder`` on.

    The draft has its type already, and the target's embeddings, which lie on the device to train on. So do its other
    weights unless they are to be sharded. Checkpoints go to ``run_folder/checkpoints``, metrics beside them. Whoever
    made ``source`` closes it.

    Raises:
        InputError: batch sizes, cache and number of processes do not fit, or the cache turns out damaged; everything up
            to the last finished step is saved then, as with whatever else ends the reading of samples.
        CheckError: the loss is no longer finite; the weights before that step are in the newest checkpoint.
        EnvironmentFault: the disk or the device's memory is full.
        KeyboardInterrupt: SIGINT or SIGTERM came; everything up to the last finished step is saved.
    """
    watcher = watcher or Watcher()
    checkpoints = run_folder / "checkpoints"
    source = source if isinstance(source, Source) else CacheSource(source)
    plan = source.plan(config, ranks)
    weights = LossWeights.of(config, draft)
    device, dtype = draft.embed_tokens.weight.device, draft.dtype
    resumed_from = step = saved = _newest_whole(checkpoints, watcher, ranks)
    progress = Progress(0, 0, 0.0, StepSums.zeros(draft.config.block_size))
    if step:
        progress = read_progress(step_folder(checkpoints, step))
        optimiser_tensors = restore_weights(step_folder(checkpoints, step), draft)
    tokens, seconds, last = progress.tokens, progress.seconds, None
    if step >= plan.total_steps:
        source.saved(step)  # the call that finished may have been killed before it said so
        return TrainResult(step, resumed_from, tokens, seconds, None, step_folder(checkpoints, step))

    objective = Objective(draft, weights)
    if shards(config, ranks):
        shard(objective, device, ranks)
    optimiser = MasterAdamW(draft.trainable_parameters(), config, dtype)
    if step:
        optimiser.restore(optimiser_tensors, step)
        del optimiser_tensors
    source.open(step)
    log = MetricsLog(run_folder, step) if ranks.first else None
    window = Window(progress.sums)
    draft.train()
    watcher.begin(plan, step)
    started = time.monotonic()
    load = Loader(
        source,
        plan,
        config.seed,
        draft.config.num_anchors,
        draft.config.block_size,
        with_last=weights.needs_target,
        device=device,
    )

    def save() -> None:
        nonlocal saved
        if saved == step:
            return
        now = Progress(step, tokens, seconds + time.monotonic() - started, window.sums)
        kept = optimiser.weights(wanted=ranks.first), optimiser.tensors(wanted=ranks.first)
        if ranks.first:
            save_checkpoint(checkpoints, draft.config, *kept, now, config.keep_checkpoints)
        ranks.wait()  # torchrun ends all processes when one has ended, also the one that writes
        saved = step
        source.saved(step)

    with (
        contextlib.closing(log) if log else contextlib.nullcontext(),
        _stop_signals() as stopped,
        contextlib.closing(batches(load, config, first_step=step, stopped=stopped)) as feed,
    ):
        while step < plan.total_steps:
            sums = StepSums.zeros(draft.config.block_size, device)
            step_tokens = 0
            for done in range(plan.accumulation):
                failure = None
                try:
                    batch = next(feed, None)  # None: stopped while waiting for it
                except NdsError as error:  # a damaged cache, say, whatever was read of it before
                    failure = error
                stops, failures = ranks.sum(torch.tensor([bool(stopped), failure is not None])).tolist()
                if stops or failures:  # an unfinished step is done again; its gradients are not kept
                    save()
                    if failure:
                        raise _stopped_by(failure, step) from failure
                    if failures:
                        ranks.wait()  # does not come back from here: another one raises
                    raise KeyboardInterrupt
                with _memory_of(device):
                    total, parts = objective(batch.to(device))
                    total.backward()
                    optimiser.accumulate()
                sums += parts
                step_tokens += batch.tokens
                watcher.forward(step, done + 1)
            values = sums.to_tensor()
            values = ranks.sum(torch.cat((values, values.new_tensor([step_tokens]))))
            sums, step_tokens = StepSums.from_tensor(values[:-1]), int(values[-1])
            weight = float(sums.weight) + EPSILON
            loss = float(sums.loss) / weight
            optimiser.normalise(weight, ranks)
            grad_norm = optimiser.clip(config.max_grad_norm)
            if not (math.isfinite(grad_norm) and math.isfinite(loss)):
                feed.close()
                found = samples_at_fault(objective, load, step, config, device, ranks)
                raise _not_finite(step, loss, grad_norm, found, config, list_checkpoints(checkpoints))
            lr = learning_rate(step, plan.total_steps, config)
            optimiser.step(lr)
            step += 1
            tokens += step_tokens
            window.add(sums, step_tokens)
            if step % config.log_every == 0 or step == plan.total_steps:
                last = window.summary(weights, step=step, epoch=plan.epoch(step - 1), lr=lr, grad_norm=grad_norm)
                if log:
                    log.write(last)
                watcher.metrics(last)
                window = Window(StepSums.zeros(draft.config.block_size))
            if step % config.checkpoint_every == 0 or plan.must_save(step):
                save()
    draft.eval()
    seconds += time.monotonic() - started
    return TrainResult(step, resumed_from, tokens, seconds, last, step_folder(checkpoints, step))


def _newest_whole(folder: Path, watcher: Watcher, ranks: Ranks) -> int:
    """Step of the newest checkpoint that is whole, 0 for none; a damaged one is passed over and said."""
    step = 0
    for checkpoint in reversed(list_checkpoints(folder)) if ranks.first else ():
        fault = damage(checkpoint)
        if not fault:
            step = read_progress(checkpoint).step
            break
        watcher.note(f"Checkpoint {checkpoint.name} is passed over: {fault}.")
    return int(ranks.sum(torch.tensor(float(step))))


def _stopped_by(failure: NdsError, step: int) -> NdsError:
    kept = "Everything until then is saved." if step else "No step was finished."
    return type(failure)(f"Training stopped after step {step}: {failure.what}", f"{failure.do} {kept}")


def _not_finite(
    step: int, loss: float, grad_norm: float, found: list[int], config: TrainConfig, checkpoints: list[Path]
) -> CheckError:
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
    kept = f"{checkpoints[-1]} is the last good checkpoint" if checkpoints else "there was no checkpoint yet"
    again = "train into another --out with a lower train.lr or max_grad_norm."
    if not found or len(found) == config.global_batch_size:
        where = " in every sample" if found else ", in no sample alone"
        return CheckError(f"Training stopped at step {step + 1}: {what}{where}; {kept}.", again.capitalize())
    named = ", ".join(map(str, found[:10])) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    where = f"sample{'s' if len(found) > 1 else ''} {named}"
    return CheckError(
        f"Training stopped at step {step + 1}: {what} because of {where}; {kept}.",
        f"Check the cache with `nds cache verify`, and what stands there in the data; if both are sound, {again}",
    )


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
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM fill the list instead of interrupting; a second one interrupts at once."""
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
