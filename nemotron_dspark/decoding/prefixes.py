"""What was read is not read again: memories of single rows, kept by the tokens that they hold.

Keys and values serve every prompt that begins with the same tokens, however few. A recurrent state holds exactly what
it has read; so the end of every prompt and of every answer is kept, where a conversation goes on, and the place where
a prompt parts from something kept that it cannot use, such as the end of a system prompt: the next one finds it.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_dspark.decoding.memory import Memory

_WORTH = 32  # tokens more that a place must save the next prompt


@dataclasses.dataclass(eq=False)
class _Kept:
    tokens: Tensor  # those that the memory depends on
    memory: Memory  # of one row
    size: int  # bytes


class Prefixes:
    """Memories of at most ``limit`` bytes in all; what was not asked for longest makes room."""

    def __init__(self, limit: int):
        self._limit = limit
        self._kept: list[_Kept] = []  # last used, last

    @property
    def held(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.size for kept in self._kept)

    def longest(self, ids: Sequence[int]) -> tuple[Memory | None, int]:
        """What holds most of ``ids`` but the last one, and where it is worth to keep a place while reading on, or 0.

        The memory is a copy.
        """
        tokens = torch.tensor(ids)
        best, most, furthest = None, 0, 0
        for kept in self._kept:
            shared = _shared(kept.tokens, tokens)
            usable = min(shared, kept.memory.length, len(ids) - 1)
            furthest = max(furthest, usable)
            whole = shared == len(kept.tokens) and usable == kept.memory.length
            if usable > most and (whole or kept.memory.shortens):
                best, most = kept, usable
        place = furthest if furthest >= most + _WORTH else 0
        if best is None:
            return None, place
        self._kept.remove(best)
        self._kept.append(best)
        memory = best.memory.select([0])
        memory.shorten(most)
        return memory, place

    def keep(self, tokens: Sequence[int], memory: Memory) -> None:
        """Keep a copy of the only row of ``memory``, which holds ``tokens`` but the last."""
        ids, size = torch.tensor(tokens if memory.looks_ahead else tokens[:-1]), memory.size
        for kept in list(self._kept):
            shared = _shared(kept.tokens, ids)
            if shared == len(ids) <= len(kept.tokens) and (kept.memory.shortens or len(ids) == len(kept.tokens)):
                return  # it is held already
            if shared == len(kept.tokens) and kept.memory.shortens:
                self._kept.remove(kept)
        if size > self._limit:
            return
        self._kept.append(_Kept(ids, memory.select([0]), size))
        while self.held > self._limit:
            del self._kept[0]


def _shared(one: Tensor, other: Tensor) -> int:
    """Tokens with which both begin."""
    count = min(len(one), len(other))
    different = (one[:count] != other[:count]).nonzero()
    return int(different[0]) if len(different) else count
