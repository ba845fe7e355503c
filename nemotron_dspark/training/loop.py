"""The training loop: accumulate, clip, step, log, save; stop cleanly, go on exactly.

All that decides a step is the weights, the optimiser's moments and the step's number. So a run killed anywhere goes on
from its newest checkpoint and ends in the same weights as an undisturbed one, bit for bit on a CPU.
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
from nemotron_dspark.errors import CheckError
from nemotron_dspark.training.batches import batches
from nemotron_dspark.training.checkpoints import (
    Progress,
    damage,
    list_checkpoints,
    read_progress,
    restore_weights,
    save_checkpoint,
)
from nemotron_dspark.training.metrics import MetricsLog, StepMetrics, Window
from nemotron_dspark.training.objective import LossWeights, dspark_loss
from nemotron_dspark.training.optimiser import MasterAdamW, learning_rate
from nemotron_dspark.training.plan import Plan
from nemotron_dspark.training.source import CacheLike, CacheSource, Source


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


def train(
    source: Source | CacheLike,
    draft: DSparkDraft,
    config: TrainConfig,
    run_folder: Path,
    *,
    watcher: Watcher | None = None,
) -> TrainResult:
    """Train ``draft`` in place to the end of the plan, from the newest whole checkpoint in ``run_folder`` on.

    The draft lies on its device in its type already, with the target's embeddings set. Checkpoints go to
    ``run_folder/checkpoints``, metrics beside them. Whoever made ``source`` closes it.

    Raises:
        InputError: batch sizes and cache do not fit, or the cache turns out damaged.
        CheckError: the loss is no longer finite; the weights before that step are in the newest checkpoint.
        EnvironmentFault: the disk is full.
        KeyboardInterrupt: SIGINT or SIGTERM came; everything up to the last finished step is saved.
    """
    watcher = watcher or Watcher()
    checkpoints = run_folder / "checkpoints"
    source = source if isinstance(source, Source) else CacheSource(source)
    plan = source.plan(config)
    weights = LossWeights.of(config, draft)
    optimiser = MasterAdamW(draft.trainable_parameters(), config)
    progress = _restore(checkpoints, draft, optimiser, watcher) or Progress(0, 0, 0.0, ())
    resumed_from = step = progress.step
    window = Window(draft.config.block_size, progress.window)
    tokens, seconds, last = progress.tokens, progress.seconds, None
    if step >= plan.total_steps:
        source.saved(step)  # the call that finished may have been killed before it said so
        return TrainResult(step, resumed_from, tokens, seconds, None)

    source.open(step)
    log = MetricsLog(run_folder, step)
    draft.train()
    watcher.begin(plan, step)
    started = time.monotonic()
    saved = step

    def save() -> None:
        nonlocal saved
        if saved != step:
            now = Progress(step, tokens, seconds + time.monotonic() - started, tuple(window.sums))
            save_checkpoint(checkpoints, draft, optimiser.tensors(), now, config.keep_checkpoints)
            saved = step
            source.saved(step)

    with (
        contextlib.closing(log),
        _stop_signals() as stopped,
        contextlib.closing(
            batches(
                source,
                plan,
                config,
                first_step=step,
                num_anchors=draft.config.num_anchors,
                block_size=draft.config.block_size,
                with_last=weights.needs_target,
                pin=draft.device.type == "cuda",
                stopped=stopped,
            )
        ) as feed,
    ):
        while step < plan.total_steps:
            sums: torch.Tensor | None = None
            step_tokens = 0
            for done in range(plan.accumulation):
                batch = next(feed, None)
                if batch is None:  # stopped while waiting for it
                    break
                batch = batch.to(draft.device)
                hidden = draft(batch.input_ids, batch.taps, batch.anchors, batch.valid)
                loss = dspark_loss(draft, hidden, batch, weights)
                (loss.value / plan.accumulation).backward()
                optimiser.accumulate()
                sums = loss.sums() if sums is None else sums + loss.sums()
                step_tokens += batch.tokens
                watcher.forward(step, done + 1)
                if stopped:
                    break
            if stopped:  # an unfinished step is done again; its gradients are not kept
                save()
                raise KeyboardInterrupt
            grad_norm = optimiser.clip(config.max_grad_norm)
            values = sums.tolist()
            if not (math.isfinite(grad_norm) and math.isfinite(values[0])):
                raise _not_finite(step, values[0], grad_norm, list_checkpoints(checkpoints))
            lr = learning_rate(step, plan.total_steps, config)
            optimiser.step(lr)
            step += 1
            tokens += step_tokens
            window.add(plan.accumulation, values, step_tokens)
            if step % config.log_every == 0 or step == plan.total_steps:
                last = window.summary(weights, step=step, epoch=plan.epoch(step - 1), lr=lr, grad_norm=grad_norm)
                log.write(last)
                watcher.metrics(last)
                window = Window(draft.config.block_size)
            if step % config.checkpoint_every == 0 or plan.must_save(step):
                save()
    draft.eval()
    return TrainResult(step, resumed_from, tokens, seconds + time.monotonic() - started, last)


def _restore(folder: Path, draft: DSparkDraft, optimiser: MasterAdamW, watcher: Watcher) -> Progress | None:
    """Take the newest checkpoint that is whole; a damaged one is passed over and said."""
    for checkpoint in reversed(list_checkpoints(folder)):
        fault = damage(checkpoint)
        if fault:
            watcher.note(f"Checkpoint {checkpoint.name} is passed over: {fault}.")
            continue
        progress = read_progress(checkpoint)
        optimiser_tensors = restore_weights(checkpoint, draft)
        optimiser.restore(optimiser_tensors, progress.step)
        return progress
    return None


def _not_finite(step: int, loss: float, grad_norm: float, checkpoints: list[Path]) -> CheckError:
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
    kept = f"{checkpoints[-1]} is the last good checkpoint" if checkpoints else "there was no checkpoint yet"
    return CheckError(
        f"Training stopped at step {step + 1}: {what}; {kept}.",
        "Train into another --out with a lower train.lr or max_grad_norm, and check the cache with `nds cache verify`.",
    )


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
