"""The target in the training loop: conversations are tokenised once, hidden states never touch the disk.

Order, ids and anchors are those of a cache of the same data, and hidden states are rounded as a cache rounds them. So
the losses are those of cached training, up to what a forward in other company rounds differently.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from nemotron_dspark.cache.capture import capture_states
from nemotron_dspark.cache.reader import Sample
from nemotron_dspark.config import TargetConfig
from nemotron_dspark.data.tokens import TokenStore
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.targets import Target, proofs
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
        on_status: Callable[[str], None] = lambda text: None,
    ):
        self.lengths = tokens.lengths
        self._tokens = tokens
        self._config = target
        self._taps = taps
        self._on_status = on_status
        self._busy = threading.Lock()

    def opening(self, sample_id: int) -> np.ndarray:
        return self._tokens.opening(sample_id)

    def open(self, step: int) -> None:
        self._target = proven_target(self._config, self._taps, self._on_status)

    def samples(self, ids: Sequence[int], step: int) -> list[Sample]:
        tokens = [self._tokens[sample_id] for sample_id in ids]
        try:
            with self._busy:
                (states,) = capture_states(self._target, [tokens], self._taps)
                states.check_finite(ids)
        except torch.OutOfMemoryError:
            raise EnvironmentFault(
                f"The target's forward over {len(ids)} samples of up to {max(self.lengths[ids])} tokens does not fit "
                f"into the memory of {self._target.device}.",
                "Lower train.local_batch_size or data.max_length, or give the draft another device (train.device).",
            ) from None
        return [
            Sample(
                torch.from_numpy(sample.input_ids.astype("int64")),
                torch.from_numpy(sample.loss_mask != 0),
                states.taps[row, : len(sample.input_ids)],
                states.last[row, : len(sample.input_ids)],
            )
            for row, sample in enumerate(tokens)
        ]

    def close(self) -> None:
        with self._busy:  # a forward that was begun ahead of a stop
            pass


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
