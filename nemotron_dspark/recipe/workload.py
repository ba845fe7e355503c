"""How much data a run has, from a file or from two numbers: what a plan needs to know of it."""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemotron_dspark.cache import needs
from nemotron_dspark.chat.mask import Tokenised, predicts_loss_token
from nemotron_dspark.config import DataConfig
from nemotron_dspark.data.conversations import Skipped, read
from nemotron_dspark.data.samples import samples_of
from nemotron_dspark.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHOLE_BYTES = 16_000_000  # of a larger file every k-th conversation is tokenised
CHARACTERS_PER_TOKEN = 4  # where there is no tokenizer
ANSWER_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Workload:
    samples: int
    tokens: int
    loss_tokens: int  # those that train the draft: the target's answers
    targets: (
        int  # positions from which such a token is predicted, after another one: a compact cache keeps their states
    )
    longest: int  # tokens of the longest sample
    source: str  # how this is known, in words
    lengths: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)  # int64; those of a file

    @property
    def mean(self) -> float:
        return self.tokens / self.samples

    @property
    def answer_share(self) -> float:
        return self.loss_tokens / self.tokens

    def largest_batch(self, batch_tokens: int) -> tuple[int, int]:
        """Padded tokens of the largest forward of a cache build, and of the one before it, whose states it writes."""
        if self.lengths is None:
            full = min(max(batch_tokens, self.longest), self.samples * self.longest)
            return full, full
        return needs.largest_batch(self.lengths, batch_tokens)


def from_numbers(
    samples: int, mean_length: int, data: DataConfig, max_positions: int, answer_share: float = ANSWER_SHARE
) -> Workload:
    """A workload of ``samples`` of ``mean_length`` tokens; the longest is as long as ``data`` and target allow.

    Raises:
        InputError: a number is not positive, or the mean is beyond the longest sample there can be.
    """
    longest = min(data.max_length, max_positions)
    if samples < 1 or mean_length < 1:
        raise InputError("--samples and --mean-length must be at least 1.", "Give how many conversations there are.")
    if not 0 < answer_share <= 1:
        raise InputError(f"--answer-share {answer_share:g} is not a share.", "Give a number above 0 and up to 1.")
    if mean_length > longest:
        raise InputError(
            f"--mean-length {mean_length} is beyond the longest sample, {longest} tokens.",
            "Samples are cut there: give at most that, or set data.max_length (the target's positions are the limit).",
        )
    tokens = samples * mean_length
    text = f"{samples:,} samples of {mean_length:,} tokens, {answer_share:.0%} of them answers"
    loss = round(tokens * answer_share)
    return Workload(samples, tokens, loss, max(0, loss - samples), longest, text)


def from_file(
    path: Path, tokenizer: "PreTrainedTokenizerBase | None", data: DataConfig, max_positions: int
) -> Workload:
    """What ``path``, JSON lines of conversations, will be as samples.

    Tokenised as a cache build does; every k-th conversation of a large file stands for k. Without a tokenizer tokens
    are guessed from characters, and `Workload.source` says so.

    Raises:
        InputError: the file cannot be read or leaves no sample.
    """
    data = data.model_copy(update={"max_length": min(data.max_length, max_positions)})
    step = max(1, round(path.stat().st_size / WHOLE_BYTES)) if path.is_file() else 1
    conversations = itertools.islice((item for item in read(path)), 0, None, step)
    if tokenizer is None:
        found = [_guessed(item, data) for item in conversations if not isinstance(item, Skipped)]
        how = f"guessed at {CHARACTERS_PER_TOKEN} characters a token, there is no tokenizer here"
    else:
        samples = (item for item in samples_of(conversations, tokenizer, data) if not isinstance(item, Skipped))
        found = [_measured(item.tokens) for item in samples]
        how = "tokenised" if step == 1 else f"every {step}th conversation tokenised"
    if not found:
        raise InputError(f"{path} leaves no sample.", "`nds data check` shows what happens to each conversation.")
    samples = step * len(found)
    tokens, loss, targets = (step * sum(numbers) for numbers in zip(*found, strict=True))
    text = f"{path.name}: {samples:,} samples of {tokens / samples:,.0f} tokens on average ({how})"
    lengths = np.array([length for length, *_ in found], dtype=np.int64)
    return Workload(samples, tokens, loss, targets, int(lengths.max()), text, lengths)


def _measured(tokens: Tokenised) -> tuple[int, int, int]:
    """Tokens, loss tokens and targets."""
    return len(tokens.input_ids), tokens.loss_tokens, int(predicts_loss_token(tokens.loss_mask).sum())


def _guessed(item: Any, data: DataConfig) -> tuple[int, int, int]:
    """Tokens, loss tokens and targets of a conversation, by its characters."""
    answers = sum(len(message.content) for message in item.messages if message.role == "assistant")
    everything = sum(len(message.content) for message in item.messages)
    length = min(max(2, everything // CHARACTERS_PER_TOKEN), data.max_length)
    loss = max(1, round(length * answers / max(1, everything)))
    return length, loss, loss - 1
