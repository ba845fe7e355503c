"""The target in the training loop: conversations are tokenised once, hidden states never touch the disk.

Order, ids and anchors are those of a cache of the same data, and hidden states are rounded as a cache rounds them. So
the losses are those of cached training, up to what a forward in other company rounds differently.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.cache.capture import States, capture_states
from nemotron_dspark.cache.reader import Sample
from nemotron_dspark.config import TargetConfig
from nemotron_dspark.data.tokens import TokenStore
from nemotron_dspark.distributed import DistContext, own_device
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.targets import Target, proofs
from nemotron_dspark.targets.target import resolve_device
from nemotron_dspark.training.source import Source

FOLDER = "samples"  # of the tokenised conversations, inside the run folder
REPORT = "samples.json"


class OnlineSource(Source):
    """Runs the target over the samples of each micro-batch, in the thread that reads ahead."""

    def __init__(
        self,
        tokens: TokenStore,
        target: TargetConfig,
        taps: tuple[int, ...],
        hidden_size: int,
        on_status: Callable[[str], None] = lambda text: None,
    ):
        self.lengths = tokens.lengths
        self.config = target
        self.on_status = on_status
        self.widths = (len(taps) * hidden_size, hidden_size)  # of a token's taps, and of its last hidden state
        self._tokens = tokens
        self._taps = taps
        self._target: Target | None = None
        self._busy = threading.Lock()

    def opening(self, sample_id: int) -> np.ndarray:
        return self._tokens.opening(sample_id)

    def open(self, step: int) -> None:
        with self._busy:  # any thread may be the first
            if self._target is None:
                self._target = proven_target(self.config, self._taps, self.on_status)

    def samples(self, ids: Sequence[int], step: int) -> list[Sample]:
        states = self.states(ids)
        states.check_finite(ids)
        return self.samples_with(ids, states.taps, states.last)

    def states(self, ids: Sequence[int]) -> States:
        """The hidden states of the samples ``ids``, in one forward of the opened target.

        Raises:
            EnvironmentFault: it does not fit into the memory.
        """
        with self._busy:
            if self._target is None:
                raise RuntimeError("the target was not opened")
            try:
                (states,) = capture_states(self._target, [[self._tokens[at] for at in ids]], self._taps)
            except torch.OutOfMemoryError:
                raise EnvironmentFault(
                    f"The target's forward over {len(ids)} samples of up to {max(self.lengths[ids])} tokens does not "
                    f"fit into the memory of {self._target.device}.",
                    "Lower train.local_batch_size or data.max_length, or give the draft another device (train.device).",
                ) from None
        return states

    def samples_with(self, ids: Sequence[int], taps: Tensor, last: Tensor) -> list[Sample]:
        """The samples ``ids`` with their hidden states: rows of ``taps`` [B, S, T·H] and ``last`` [B, S, H]."""
        tokens = [self._tokens[sample_id] for sample_id in ids]
        return [
            Sample(
                torch.from_numpy(sample.input_ids.astype("int64")),
                torch.from_numpy(sample.loss_mask != 0),
                taps[row, : len(sample.input_ids)],
                last[row, : len(sample.input_ids)],
            )
            for row, sample in enumerate(tokens)
        ]

    def close(self) -> None:
        with self._busy:  # a forward that was begun ahead of a stop
            pass


def on_own_device(config: TargetConfig, context: DistContext) -> TargetConfig:
    """``config`` for a process that holds the target as all others do. Raises what `own_device` does."""
    device = own_device(resolve_device(config.device), "target.device", context)
    return config if context.world_size == 1 else config.model_copy(update={"device": str(device)})


def proven_target(
    config: TargetConfig,
    taps: tuple[int, ...],
    on_status: Callable[[str], None],
    load: Callable[[TargetConfig], Target] = Target.of,
) -> Target:
    """Load the target and prove it right, unless ``config`` says not to."""
    on_status("loading the target")
    target = load(config)
    if config.proofs:
        on_status("proving the target")
        proofs.prove(target, taps)
    on_status("")
    return target
