"""What was read is not read again: memories of single rows, kept by the tokens that they hold.

Keys and values serve every prompt that begins with the same tokens, however few. A recurrent state holds exactly what
it has read; so the end of every prompt and of every answer is kept, where a conversation goes on, and the place where
a prompt parts from something kept that it cannot use, such as the end of a system prompt: the next one finds it.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from nemotron_dspark.decoding.memory import Memory

_WORTH = 32  # tokens more that a place must save the next prompt
_BYTES = 4  # of a token in a key: big-endian, so that keys sort as their tokens do


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    memory: Memory  # of one row
    size: int  # bytes


class Prefixes:
    """Memories of at most ``limit`` bytes in all; what was not asked for longest makes room.

    Keys are the tokens that a memory depends on. In their order what shares most of a prompt stands next to it.
    """

    def __init__(self, limit: int):
        self.held = 0  # bytes of what is kept
        self._limit = limit
        self._kept: dict[bytes, _Kept] = {}  # last used, last
        self._sorted: list[bytes] = []

    def longest(self, ids: Sequence[int]) -> tuple[Memory | None, int]:
        """What holds most of ``ids`` but the last one, and where it is worth to keep a place while reading on, or 0.

        The memory is a copy.
        """
        key, best, most, furthest = _key(ids), None, 0, 0
        for near in self._neighbours(key):
            memory = self._kept[near].memory
            usable = min(_shared(near, key), memory.length, len(ids) - 1)
            furthest = max(furthest, usable)
            if usable > most and memory.shortens:
                best, most = near, usable
        for prefix in self._prefixes_of(key):
            if (length := self._kept[prefix].memory.length) < len(ids):
                if length > most:
                    best, most = prefix, length
                break
        place = furthest if furthest >= most + _WORTH else 0
        if best is None:
            return None, place
        self._kept[best] = found = self._kept.pop(best)
        memory = found.memory.select([0])
        memory.shorten(most)
        return memory, place

    def keep(self, tokens: Sequence[int], memory: Memory, row: int = 0) -> None:
        """Keep a copy of a ``row`` of ``memory``, which holds ``tokens`` but the last."""
        key = _key(tokens if memory.looks_ahead else tokens[:-1])
        longer = [near for near in self._neighbours(key) if near.startswith(key)]
        if not key or any(near == key or self._kept[near].memory.shortens for near in longer):
            return  # it is held already
        for prefix in list(self._prefixes_of(key)):
            if self._kept[prefix].memory.shortens:
                self._drop(prefix)
        copy = memory.select([row])
        if (size := copy.size) > self._limit:
            return
        self._kept[key] = _Kept(copy, size)
        bisect.insort(self._sorted, key)
        self.held += size
        while self.held > self._limit:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        self.held -= self._kept.pop(key).size
        del self._sorted[bisect.bisect_left(self._sorted, key)]

    def _neighbours(self, key: bytes) -> list[bytes]:
        """The kept keys before and behind ``key``; itself, if it is kept, is the one behind."""
        at = bisect.bisect_left(self._sorted, key)
        return self._sorted[max(0, at - 1) : at + 1]

    def _prefixes_of(self, key: bytes) -> Iterator[bytes]:
        """The kept keys that ``key`` begins with, the longest first."""
        cut = key
        while at := bisect.bisect_right(self._sorted, cut):
            found = self._sorted[at - 1]
            if key.startswith(found):
                yield found
                cut = found[:-_BYTES]
            else:  # no kept prefix is longer than what both share
                cut = key[: _BYTES * _shared(found, key)]


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=">u4").tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """Tokens with which both begin."""
    count = min(len(one), len(other)) // _BYTES
    tokens = (np.frombuffer(each, dtype=">u4", count=count) for each in (one, other))
    different = np.flatnonzero(np.not_equal(*tokens))
    return int(different[0]) if len(different) else count
