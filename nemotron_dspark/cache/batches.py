"""Which samples share a forward: those of similar length among many that follow one another in the data.

A pure function of the lengths. What shares a forward decides how hidden states round, so a build that goes on must
compute the batches that the first one would have, whoever computes them.
"""

from collections.abc import Iterator

import numpy as np

_BUCKET = 64  # batches' worth of tokens are sorted together: the padding of chats of up to 1024 tokens is then 2 %
_FIRST = 16  # of the first bucket; each is as large as all before it together, up to _BUCKET
_SHORTEST = 0.9  # of a batch's longest sample: what is shorter does not join a batch that is large enough
_ENOUGH = 0.25  # of batch_tokens: a forward of so many is about as fast as a full one


def batches(
    lengths: np.ndarray,  # int64 [samples]
    batch_tokens: int,
) -> Iterator[list[int]]:
    """Batches of at most ``batch_tokens`` padded tokens, or of one sample; each sample is in one of them."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        size = min(max(before, _FIRST * batch_tokens), _BUCKET * batch_tokens)
        stop = min(int(np.searchsorted(ends, before + size)) + 1, len(lengths))
        yield from _cut_bucket(lengths, first, stop, batch_tokens)
        first = stop


def _cut_bucket(lengths: np.ndarray, first: int, stop: int, batch_tokens: int) -> Iterator[list[int]]:
    """The batches of the samples from ``first`` to ``stop``.

    The longest samples come first: if they do not fit in memory, that shows at once.
    """
    bucket = lengths[first:stop]
    batch: list[int] = []
    longest = 0
    for place in np.argsort(-bucket, kind="stable").tolist():
        length = int(bucket[place])
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
