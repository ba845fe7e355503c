"""One forward of the target over tokenised samples: what a cache stores of them, checked."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.errors import CheckError
from nemotron_dspark.targets import Target
from nemotron_dspark.targets.spec import TargetSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def capture_states(target: Target, samples: Sequence[Tokenised], taps: tuple[int, ...]) -> States:
    """Start one forward over ``samples``. It needs no mask: no token sees a later one, and padding comes last.

    That is what the proof of causality shows on the loaded target; without a mask attention takes its fastest path.
    """
    input_ids, real = _padded(samples, target.tokenizer.pad_token_id or 0)
    captured = target.capture(input_ids.to(target.device), None, taps)
    tapped, last = captured.taps.to(torch.bfloat16), captured.last.to(torch.bfloat16)
    sums = tapped.sum(-1, dtype=torch.float32) + last.sum(-1, dtype=torch.float32)  # one that is not finite shows
    done = None
    if tapped.is_cuda:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(tapped.device))
    return States(tapped, last, torch.isfinite(sums), real, done)


def _padded(samples: Sequence[Tokenised], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] padded on the right, and which of them are real [B, S]."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    input_ids = torch.full((len(samples), int(lengths.max())), pad, dtype=torch.long)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = torch.from_numpy(sample.input_ids)
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]
