"""What a data file holds before anything is spent on it: usable conversations, tokens, and the share that trains."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from nemotron_dspark.config.run import DataConfig
from nemotron_dspark.data.conversations import Skipped, SkipTally, read
from nemotron_dspark.data.samples import LinedSample, read_samples
from nemotron_dspark.data.sources import Given, named, one_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class DataReport:
    file: str  # or what else names the data
    conversations: int  # that can be used
    answers: int
    cut_answers: int  # conversations whose last answer has no end
    skipped: SkipTally
    samples: int | None = None  # from here on only with a tokenizer
    tokens: int | None = None
    loss_tokens: int | None = None
    longest: int | None = None
    median: int | None = None
    at_max_length: int | None = None


def check_data(
    file: Given,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    data: DataConfig | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Count what `cache build` would make of ``file``; without a tokenizer only the conversations.

    Raises:
        InputError: the file cannot be read or holds no usable conversation.
    """
    data, path = data or DataConfig(), one_file(file)
    skipped, known = SkipTally(), None
    conversations = answers = cut = loss_tokens = 0
    lengths: list[int] = []
    for number, item in enumerate(read(path) if tokenizer is None else read_samples(path, tokenizer, data), start=1):
        if progress:
            progress(number)
        if isinstance(item, Skipped):
            skipped.add(item)
            continue
        if isinstance(item, LinedSample):
            lengths.append(len(item.tokens.input_ids))
            loss_tokens += item.tokens.loss_tokens
            item = item.conversation
        if item is not known:  # else another sample of it
            known = item
            conversations += 1
            answers += sum(message.role == "assistant" for message in item.messages)
            cut += not item.complete
    report = DataReport(named(file), conversations, answers, cut, skipped)
    if tokenizer is None:
        return report
    return dataclasses.replace(
        report,
        samples=len(lengths),
        tokens=sum(lengths),
        loss_tokens=loss_tokens,
        longest=max(lengths, default=0),
        median=int(np.median(lengths)) if lengths else 0,
        at_max_length=lengths.count(data.max_length),
    )
