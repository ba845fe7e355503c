"""One forward of the target over tokenised samples: what a cache stores of them, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemotron_dspark.chat.mask import Tokenised
from nemotron_dspark.errors import CheckError


class CapturesStates(Protocol):
    """What the cache needs of a `targets.Target`."""

    spec: Any
    tokenizer: Any
    folder: Path
    dtype: torch.dtype
    device: torch.device

    def capture(self, input_ids: Tensor, attention_mask: Tensor | None, taps: tuple[int, ...]) -> Any: ...


def captured_states(
    target: CapturesStates,
    samples: Sequence[Tokenised],
    sample_ids: Sequence[int],  # for the message
    taps: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Taps [B, S, T·H] and last hidden states [B, S, H] as a cache rounds them, bf16, on the target's device.

    Rows are padded on the right; what they hold behind their sample is without meaning.

    Raises:
        CheckError: a hidden state of a real token is not finite.
    """
    input_ids, real = _padded(samples, target.tokenizer.pad_token_id or 0)
    captured = target.capture(input_ids.to(target.device), real.to(target.device), taps)
    tapped, last = captured.taps.to(torch.bfloat16), captured.last.to(torch.bfloat16)
    _check_finite(tapped, last, real, sample_ids)
    return tapped, last


def _padded(samples: Sequence[Tokenised], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] padded on the right, and which of them are real [B, S]."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    input_ids = torch.full((len(samples), int(lengths.max())), pad, dtype=torch.long)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = torch.from_numpy(sample.input_ids)
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]


def _check_finite(
    taps: Tensor,  # bf16 [B, S, T·H]
    last: Tensor,  # bf16 [B, S, H]
    real: Tensor,  # bool [B, S]
    sample_ids: Sequence[int],
) -> None:
    sums = taps.sum(-1, dtype=torch.float32) + last.sum(-1, dtype=torch.float32)  # one number that is not finite shows
    broken = (~torch.isfinite(sums).cpu() & real).any(dim=1)  # [B]
    if broken.any():
        raise CheckError(
            f"The target's hidden states of sample {sample_ids[int(broken.nonzero()[0])]} are not finite.",
            "Load the target in another type (target.dtype=bfloat16 or float32).",
        )
