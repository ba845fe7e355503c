"""Which samples share a forward: those of similar length among many that follow one another in the data.

A pure function of the lengths. So a build that goes on computes what the first one would have, whoever computes it, and
batches are known as soon as their samples are tokenised.
"""

from collections.abc import Iterator

import numpy as np

_WINDOW = 64  # batches' worth of tokens are sorted together: the padding of chats of up to 1024 tokens is then 2 %
_FIRST = 16  # in the beginning, so that the first forward need not wait for more than these
_SHORTEST = 0.9  # of a batch's longest sample: what is shorter does not join a batch that is large enough
_ENOUGH = 0.25  # of batch_tokens: a forward of so many is about as fast as a full one


def window_stop(lengths: np.ndarray, first: int, batch_tokens: int) -> int | None:
    """End of the run of samples that is sorted together from ``first``; None when it lies beyond ``lengths``.

    It has as many tokens as there are before it, within limits.
    """
    before = int(lengths[:first].sum())
    enough = np.cumsum(lengths[first:]) >= min(max(before, _FIRST * batch_tokens), _WINDOW * batch_tokens)
    return first + int(enough.argmax()) + 1 if enough.any() else None


def cut(lengths: np.ndarray, first: int, stop: int, batch_tokens: int) -> Iterator[list[int]]:
    """Batches of the samples from ``first`` to ``stop``, of at most ``batch_tokens`` padded tokens, or of one sample.

    The longest samples come first: if they do not fit in memory, that shows at once.
    """
    window = lengths[first:stop]
    batch: list[int] = []
    longest = 0
    for place in np.argsort(-window, kind="stable").tolist():
        length = int(window[place])
        padded = longest * len(batch)
        if batch and (
            padded + longest > batch_tokens or (length < _SHORTEST * longest and padded >= _ENOUGH * batch_tokens)
        ):
            yield batch
            batch = []
        if not batch:
            longest = length
        batch.append(first + place)
    yield batch


def batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """All batches of a whole data set, as a build computes them."""
    first = 0
    while first < len(lengths):
        stop = window_stop(lengths, first, batch_tokens) or len(lengths)
        yield from cut(lengths, first, stop, batch_tokens)
        first = stop
