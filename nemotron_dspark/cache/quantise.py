"""Quantise hidden states to 4 bits a channel, and back.

A state (one tap, or the last one, of one token) is quantised by itself: its bytes depend on nothing else in the batch.
It first takes the largest value of every group of channels out and keeps it as it is, then rotates the rest of the
group, which leaves something close to a normal distribution, and stores for every channel the nearest of the 16 levels
that are best for one. Rotating inside groups, not over the whole state, keeps the error that a few huge channels cause
out of all other channels; docs/compact.md has the figures.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.errors import InputError

GROUP = 128  # channels with a scale of their own; where it does not divide the width, the largest power of 2 that does
# Lloyd (1982) and Max (1960): the positive half of the 16 levels with the least squared error for a unit normal.
_LEVELS = (0.12911, 0.39020, 0.66035, 0.94772, 1.26214, 1.62484, 2.07682, 2.74367)
_STRETCH = 0.93  # of the scale that puts a group's largest value on the last level; least squared error, measured
_REACH, _FINE = 4, 64  # the nearest level is looked up for values within ±reach, 64 of them in every unit
_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 21}  # values handled together: on a CPU they stay in its cache


@dataclasses.dataclass(frozen=True)
class Component:
    """One array that states become: [states, columns] of ``dtype``."""

    name: str
    dtype: torch.dtype
    columns: int


class Int4:
    """The quantiser of states of ``width`` channels: 16 levels after a rotation of each group, its largest value apart.

    Raises:
        InputError: the width has no group of at least two channels.
    """

    def __init__(self, width: int):
        self.width = width
        self.group = math.gcd(width, GROUP)
        if self.group < 2:
            raise InputError(
                f"Hidden states of {width} channels cannot be quantised in groups.", "Set cache.format=deepspec."
            )

    @property
    def parts(self) -> tuple[Component, ...]:
        """What a state becomes, in the order of `encode`."""
        groups = self.width // self.group
        return (
            Component("codes", torch.uint8, self.width // 2),  # channel 2i in the low half of byte i
            Component("scales", torch.bfloat16, groups),
            Component("largest", torch.bfloat16, groups),
            Component("largest_at", torch.uint8, groups),  # channel inside the group
        )

    @property
    def state_bytes(self) -> int:
        return sum(part.columns * part.dtype.itemsize for part in self.parts)

    def encode(
        self,
        states: Tensor,  # [N, width], finite
    ) -> tuple[Tensor, ...]:
        """Quantise ``states``, rounded to bf16, to their `parts` [N, columns]; on the same device."""
        width, groups = self.width, self.width // self.group
        found = []
        for some in states.split(self._states_at_once(states.device)):
            grouped = some.bfloat16().float().view(len(some), groups, self.group)  # [n, groups, channels]
            at = grouped.abs().argmax(dim=2, keepdim=True)
            largest = grouped.gather(2, at)
            rotated = self._rotate(grouped.scatter(2, at, 0.0))
            scales = (rotated.abs().amax(dim=2, keepdim=True) * (_STRETCH / _LEVELS[-1])).bfloat16()
            divisor = torch.where(scales > 0, scales, 1).float()  # 1 where a group is zero
            place = ((rotated / divisor + _REACH) * _FINE).clamp(0, 2 * _REACH * _FINE - 1)
            codes = _nearest_levels().to(states.device).index_select(0, place.int().flatten()).view(len(some), width)
            packed = codes[:, 0::2] | codes[:, 1::2] << 4
            found.append((packed, scales[..., 0], largest[..., 0].bfloat16(), at[..., 0].to(torch.uint8)))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def decode(
        self,
        parts: Mapping[str, Tensor],  # by name, on a CPU
    ) -> Tensor:
        """What is left of the states, bf16 [N, width]."""
        count = len(next(iter(parts.values())))
        decoded = torch.empty(count, self.width, dtype=torch.bfloat16)
        step = self._states_at_once(decoded.device)
        for first in range(0, count, step):
            some = {name: part[first : first + step] for name, part in parts.items()}
            levels = _level_pairs().index_select(0, some["codes"].flatten().int()).numpy().view(np.float32)
            scaled = torch.from_numpy(levels).view(-1, self.width // self.group, self.group)
            groups = (scaled * some["scales"].float()[..., None]) @ self._back()
            groups.scatter_(2, some["largest_at"].long()[..., None], some["largest"].float()[..., None])
            decoded[first : first + step] = groups.flatten(1)
        return decoded

    def sound(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether ``parts`` can be decoded to finite numbers."""
        finite = all(bool(parts[name].isfinite().all()) for name in ("scales", "largest"))
        return finite and bool((parts["largest_at"] < self.group).all())

    def _states_at_once(self, device: torch.device) -> int:
        return max(1, _AT_ONCE.get(device.type, _AT_ONCE["cuda"]) // self.width)

    def _rotate(
        self,
        groups: Tensor,  # fp32 [n, groups, channels]
    ) -> Tensor:
        """Apply signs and Hadamard matrix to each group.

        Additions in a fixed order, no matrix product: neither the batch nor the device shows in the bytes.
        """
        rotated = groups * _signs(self.group).to(groups.device)
        for _ in range(self.group.bit_length() - 1):
            first, second = rotated[..., 0::2], rotated[..., 1::2]
            rotated = torch.cat((first + second, first - second), dim=-1)
        return rotated * self.group**-0.5

    def _back(self) -> Tensor:
        """fp32 [channels, channels]: the inverse of the rotation."""
        return _sums(self.group) * _signs(self.group) * self.group**-0.5


@functools.cache
def _signs(size: int) -> Tensor:
    """Random signs ±1 [size] of the rotation, the same in every version.

    Without them a state that is the same in all channels would be rotated into a single number.
    """
    digest = np.frombuffer(hashlib.shake_128(b"nemotron-dspark").digest(size), np.uint8)
    return torch.from_numpy(1 - 2 * (digest & 1).astype(np.float32))


@functools.cache
def _sums(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, ±1 [size, size]; it is its own transpose."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@functools.cache
def _levels() -> np.ndarray:
    """The 16 levels, ascending, fp32."""
    return np.array([*(-level for level in reversed(_LEVELS)), *_LEVELS], np.float32)


@functools.cache
def _nearest_levels() -> Tensor:
    """uint8 [2·reach·fine]: the level nearest to the middle of every step."""
    middles = (np.arange(2 * _REACH * _FINE) + 0.5) / _FINE - _REACH
    return torch.from_numpy(np.abs(middles[:, None] - _levels()).argmin(axis=1).astype(np.uint8))


@functools.cache
def _level_pairs() -> Tensor:
    """Two fp32 levels for every byte, as fp64 [256]: one look-up finds both."""
    pairs = np.stack((np.tile(_levels(), 16), np.repeat(_levels(), 16)), axis=1)
    return torch.from_numpy(np.ascontiguousarray(pairs).view(np.float64)[:, 0])
