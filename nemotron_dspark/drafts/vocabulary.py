"""The tokens that a draft can draft, where these are not all of its target's: those that the data uses most.

A draft's head is then as much smaller, and so is what training and decoding compute with it. What a draft cannot draft
it never proposes; the target writes it itself, at the price of one rejected slot.
"""

from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.errors import InputError


def check_size(size: int, vocab_size: int, kept: Collection[int]) -> None:
    """`InputError` when no draft can have ``size`` of a target's ``vocab_size`` tokens, all of ``kept`` among them."""
    if size > vocab_size:
        raise InputError(
            f"draft.vocabulary is {size}, and the target has {vocab_size} tokens.",
            f"Set it below {vocab_size}, or leave it out.",
        )
    if size < len(kept):
        raise InputError(
            f"draft.vocabulary is {size}, fewer than the target's {len(kept)} special tokens, which are always kept.",
            f"Set it to at least {len(kept)}, and to a quarter of the target's {vocab_size} to begin with.",
        )


def most_used(
    samples: Iterable[tuple[np.ndarray | Tensor, np.ndarray | Tensor]],  # ids [S] and loss mask [S] of each
    size: int,
    vocab_size: int,
    kept: Collection[int],
) -> tuple[Tensor, float]:
    """The ``size`` tokens that carry loss most often, ``kept`` among them: ascending ids [size]; their share of all.

    Where two are as frequent the lower id goes first: a byte-pair vocabulary has learned it earlier.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids, mask in samples:
        counts += np.bincount(np.asarray(ids)[np.asarray(mask) != 0], minlength=vocab_size)
    ranked = counts.copy()
    ranked[list(kept)] = np.iinfo(np.int64).max
    chosen = np.sort(np.argsort(-ranked, kind="stable")[:size])
    return torch.from_numpy(chosen), float(counts[chosen].sum() / max(1, counts.sum()))
