"""From a data file to tokenised samples: the one place that decides which conversation becomes which samples."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemotron_dspark.chat.format import Conversation, RenderError
from nemotron_dspark.chat.mask import NotMaskable, Tokenised, tokenise
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.conversations import Skipped, read


@dataclasses.dataclass(frozen=True)
class LinedSample:
    line: int
    conversation: Conversation
    tokens: Tokenised


def samples_of(
    items: Iterable[Conversation | Skipped], tokenizer: Any, data: DataConfig
) -> Iterator[LinedSample | Skipped]:
    """Every conversation of ``items``, as `conversations.read` gives them, as a sample, or skipped with the reason."""
    for item in items:
        if isinstance(item, Skipped):
            yield item
            continue
        line = int(item.origin.rpartition(":")[2])
        try:
            tokens = tokenise(tokenizer, item, max_length=data.max_length, thinking=data.thinking)
        except (NotMaskable, RenderError) as reason:
            yield Skipped(line, reason.what.rstrip("."))
            continue
        if tokens.loss_tokens < data.min_loss_tokens:
            yield Skipped(line, f"fewer than {data.min_loss_tokens} loss tokens")
        else:
            yield LinedSample(line, item, tokens)


def read_samples(file: Path | str, tokenizer: Any, data: DataConfig) -> Iterator[LinedSample | Skipped]:
    """`samples_of` the conversations of ``file``; errors as in `conversations.read`."""
    yield from samples_of(read(file), tokenizer, data)
