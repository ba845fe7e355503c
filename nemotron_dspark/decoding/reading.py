"""Chunked prefill: prompts are read in chunks, between which answers in progress go on; short ones several at once.

A pass reads one chunk of each of its rows, padded to the longest; the padding is never committed. Only the target's
states meet in a pass: the draft reads a row's positions by themselves, which is little.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_dspark.decoding.memory import Memory
from nemotron_dspark.decoding.prefixes import Prefixes
from nemotron_dspark.drafts.dspark import Draft
from nemotron_dspark.errors import InputError
from nemotron_dspark.targets import Target

_FULL = 0.5  # of a pass's length that a prompt must fill to be read beside the oldest one


@dataclasses.dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read, to start answers from."""

    ids: tuple[int, ...]
    memory: Memory  # the draft's context ends before ``taps``: it may want to know the token that follows them
    logits: Tensor  # [1, V] of the first token
    taps: Tensor  # [1, n, T·H] of the last chunk
    reused: int  # tokens that had been read for others


@dataclasses.dataclass(eq=False)
class Reading:
    """A prompt on its way. Read it freely; only the `Reader` that began it writes it."""

    ids: tuple[int, ...]
    memory: Memory
    reused: int = 0  # tokens that were read before
    place: int = 0  # a length at which the memory is to be kept; 0: none
    prompt: ReadPrompt | None = None  # once it is read to its end
    error: Exception | None = None  # what ended it before

    @property
    def read(self) -> int:
        """Tokens that the target has read."""
        return self.memory.length

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.ids) - self.read

    @property
    def ended(self) -> bool:
        return self.prompt is not None or self.error is not None


class Reader:
    """Reads prompts with one target and at most one draft."""

    def __init__(self, target: Target, draft: Draft | None, taps: tuple[int, ...], prefixes: Prefixes | None):
        self.prefixes = prefixes
        self._target = target
        self._draft = draft
        self._taps = taps

    def begin(self, ids: Sequence[int]) -> Reading:
        """A prompt of which nothing is read yet but what is kept.

        Raises:
            InputError: it is empty.
        """
        if len(ids) == 0:
            raise InputError("The prompt has no tokens.", "Give at least one token.")
        memory, place = self.prefixes.longest(ids) if self.prefixes is not None else (None, 0)
        if memory is None:
            context = self._draft.new_context() if self._draft is not None else None
            memory = Memory(self._target.new_state(self._taps), context)
        return Reading(tuple(ids), memory, memory.length, place)

    def read(self, ids: Sequence[int]) -> ReadPrompt:
        """A prompt, read to its end.

        Raises:
            InputError: it is empty.
        """
        reading = self.begin(ids)
        while reading.prompt is None:
            self._pass([reading], self._chunk(reading))
        return reading.prompt

    def step(self, readings: Sequence[Reading], budget: int) -> None:
        """Read about ``budget`` tokens on, padding counted, the first of ``readings`` first.

        Those with the same ``ids``, as choices of one request have them, are read once. What goes wrong in a pass ends
        those that it was to read, with an `error`.
        """
        firsts: dict[int, Reading] = {}
        for reading in readings:
            if not reading.ended:
                firsts.setdefault(id(reading.ids), reading)
        while budget > 0 and (waiting := [reading for reading in firsts.values() if not reading.ended]):
            size = self._chunk(waiting[0])
            if self._target.prefill_chunk:
                size = min(size, budget)
            together = budget // size if self._target.prefill_chunk else 1
            fitting = [reading for reading in waiting[1:] if self._chunk(reading) >= _FULL * size]
            rows = [waiting[0], *fitting[: together - 1]]
            budget -= size * len(rows)
            try:
                self._pass(rows, size)
            except Exception as error:
                for reading in rows:
                    reading.error = error
        for reading in readings:
            first = firsts.get(id(reading.ids), reading)
            if first is not reading and first.prompt is not None:
                reading.prompt = dataclasses.replace(first.prompt, reused=len(reading.ids))
            elif first is not reading:
                reading.error = first.error

    def _chunk(self, reading: Reading) -> int:
        """Tokens of the next chunk, if it has room."""
        end = reading.place if reading.place > reading.read else len(reading.ids)
        return min(end - reading.read, self._target.prefill_chunk or reading.left)

    @torch.no_grad()
    def _pass(self, rows: Sequence[Reading], size: int) -> None:
        """Read the next ``size`` tokens of each of ``rows``, or all that are left."""
        chunks = [row.ids[row.read : row.read + min(size, self._chunk(row))] for row in rows]
        state = rows[0].memory.state
        for other in rows[1:]:
            state.join(other.memory.state)
        last, taps = self._target.read(state, chunks)
        for at, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            row.memory = Memory(state.select([at]) if len(rows) > 1 else state, row.memory.context)
            tapped = taps[at : at + 1, : len(chunk)]
            if row.left == 0:
                row.prompt = ReadPrompt(row.ids, row.memory, self._target.logits(last[at : at + 1]), tapped, row.reused)
                continue
            if self._draft is not None and row.memory.context is not None:
                following = torch.tensor([row.ids[row.read - len(chunk) + 1 : row.read + 1]], device=taps.device)
                self._draft.extend(row.memory.context, tapped, [len(chunk)], following)
            if self.prefixes is not None and row.read == row.place:
                self.prefixes.keep(row.ids[: row.read + 1], row.memory)
