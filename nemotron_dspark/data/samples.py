"""From a data file to tokenised samples: the one place that decides which conversation becomes which samples."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_dspark.chat.format import Conversation, RenderError
from nemotron_dspark.chat.mask import NotMaskable, Tokenised, tokenise
from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.conversations import Skipped, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class LinedSample:
    conversation: Conversation
    tokens: Tokenised

    @property
    def line(self) -> int:
        return self.conversation.line


def samples_of(
    items: Iterable[Conversation | Skipped], tokenizer: "PreTrainedTokenizerBase", data: DataConfig
) -> Iterator[LinedSample | Skipped]:
    """Every conversation of ``items``, as `conversations.read` gives them, as samples, or skipped with the reason.

    A conversation is several samples, one after the other, where the chat template rewrites its history. Parts of it
    that train nothing are skipped too: at most once a reason.
    """
    for item in items:
        if isinstance(item, Skipped):
            yield item
            continue
        try:
            found = tokenise(tokenizer, item, max_length=data.max_length, thinking=data.thinking)
        except (NotMaskable, RenderError) as reason:
            yield Skipped(item.line, reason.what.rstrip("."))
            continue
        long_enough = [sample for sample in found.samples if sample.loss_tokens >= data.min_loss_tokens]
        for sample in long_enough:
            yield LinedSample(item, sample)
        if not long_enough:
            yield Skipped(item.line, f"fewer than {data.min_loss_tokens} loss tokens")
        elif len(long_enough) < len(found.samples):
            yield Skipped(item.line, f"a turn of fewer than {data.min_loss_tokens} loss tokens; the rest is used")
        if long_enough and found.retold:
            yield Skipped(
                item.line, "token ids of an answer that follow another prompt than the template's; its text is used"
            )
        if long_enough and found.unfit:
            yield Skipped(item.line, "an answer that does not fit the conversation's thinking mode; the rest is used")


def read_samples(
    file: Path | str, tokenizer: "PreTrainedTokenizerBase", data: DataConfig
) -> Iterator[LinedSample | Skipped]:
    """`samples_of` the conversations of ``file``; errors as in `conversations.read`."""
    return samples_of(read(file), tokenizer, data)
