"""Hidden states in a quarter to a half of their bytes, and back.

A state (one tap, or the last one, of one token) is quantised by itself: its bytes depend on nothing else in the batch.
int4 first takes the largest value of every group of channels out and keeps it as it is, then rotates the rest of the
group, which leaves something close to a normal distribution, and stores for every channel the nearest of the 16 levels
that are best for one. Rotating inside groups, not over the whole state, keeps the error that a few huge channels cause
out of all other channels; docs/compact.md has the figures.
"""

import abc
import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nemotron_dspark.errors import InputError

GROUP = 128  # channels with a scale of their own; where it does not divide the width, the largest power of 2 that does
_LARGEST_FP8 = 448.0  # of e4m3
# Lloyd (1982) and Max (1960): the positive half of the 16 levels with the least squared error for a unit normal.
_LEVELS = (0.12911, 0.39020, 0.66035, 0.94772, 1.26214, 1.62484, 2.07682, 2.74367)
_STRETCH = 0.93  # of the scale that puts a group's largest value on the last level; least squared error, measured
_REACH, _FINE = 4, 64  # the nearest level is looked up for values within ±reach, 64 of them in every unit
_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 21}  # values handled together: on a CPU they stay in its cache


@dataclasses.dataclass(frozen=True)
class Part:
    """One array that states become: [states, columns] of ``dtype``."""

    name: str
    dtype: torch.dtype
    columns: int

    @property
    def bytes(self) -> int:
        """Of one state."""
        return self.columns * self.dtype.itemsize


class Quantiser(abc.ABC):
    """A way to store states of ``width`` channels."""

    def __init__(self, width: int):
        self.width = width
        self.group = math.gcd(width, GROUP)

    @property
    @abc.abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What a state becomes, in the order of `encode`."""

    def encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """``states`` [N, width], finite, rounded to bf16, as its `parts`; on the same device."""
        step = self._states_at_once(states.device)
        some = [self._encode(states[first : first + step].bfloat16()) for first in range(0, len(states), step)]
        if not some:
            return tuple(torch.empty(0, part.columns, dtype=part.dtype) for part in self.parts)
        return some[0] if len(some) == 1 else tuple(map(_joined, zip(*some, strict=True)))

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What is left of the states, bf16 [N, width]; ``parts`` by name, on a CPU."""
        count = len(next(iter(parts.values())))
        decoded = torch.empty(count, self.width, dtype=torch.bfloat16)
        step = self._states_at_once(decoded.device)
        for first in range(0, count, step):
            some = {name: part[first : first + step] for name, part in parts.items()}
            decoded[first : first + step] = self._decode(some)
        return decoded

    @abc.abstractmethod
    def _encode(self, states: Tensor) -> tuple[Tensor, ...]:
        """Of a few states, bf16 [n, width]."""

    @abc.abstractmethod
    def _decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """fp32 [n, width] of a few states."""

    def _states_at_once(self, device: torch.device) -> int:
        return max(1, _AT_ONCE.get(device.type, _AT_ONCE["cuda"]) // self.width)

    @property
    def state_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def sound(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether ``parts`` can be decoded to finite numbers."""
        return all(
            bool(parts[part.name].float().isfinite().all()) for part in self.parts if part.dtype.is_floating_point
        )

    def _grouped(self, states: Tensor) -> Tensor:
        """fp32 [N, groups, channels]."""
        return states.float().view(len(states), -1, self.group)


class Fp8(Quantiser):
    """e4m3 with one scale a state."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("codes", torch.float8_e4m3fn, self.width), Part("scales", torch.bfloat16, 1)

    def _encode(self, states: Tensor) -> tuple[Tensor, ...]:
        states = states.float()
        scales = (states.abs().amax(dim=1, keepdim=True) / _LARGEST_FP8).bfloat16()
        scaled = (states / _divisor(scales)).clamp(-_LARGEST_FP8, _LARGEST_FP8)
        return scaled.to(torch.float8_e4m3fn), scales

    def _decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["codes"].view(torch.uint8).flatten().int()
        return _fp8_values().index_select(0, codes).view(-1, self.width) * parts["scales"].float()


class Int8(Quantiser):
    """-127 to 127 with a scale for every group of channels."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("codes", torch.int8, self.width), Part("scales", torch.bfloat16, self.width // self.group)

    def _encode(self, states: Tensor) -> tuple[Tensor, ...]:
        groups = self._grouped(states)
        scales = (groups.abs().amax(dim=2) / 127).bfloat16()
        codes = (groups / _divisor(scales)[..., None]).round().clamp(-127, 127)
        return codes.to(torch.int8).flatten(1), scales

    def _decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return (self._grouped(parts["codes"]) * parts["scales"].float()[..., None]).flatten(1)


class Int4(Quantiser):
    """16 levels after a rotation of each group, whose largest value is kept apart."""

    def __init__(self, width: int):
        super().__init__(width)
        if self.group < 2:
            raise InputError(f"Hidden states of {width} channels do not fit int4.", "Set cache.quantisation=int8.")

    @property
    def parts(self) -> tuple[Part, ...]:
        groups = self.width // self.group
        return (
            Part("codes", torch.uint8, self.width // 2),  # channel 2i in the low half of byte i
            Part("scales", torch.bfloat16, groups),
            Part("largest", torch.bfloat16, groups),
            Part("largest_at", torch.uint8, groups),  # channel inside the group
        )

    def _encode(self, states: Tensor) -> tuple[Tensor, ...]:
        groups = self._grouped(states)
        at = groups.abs().argmax(dim=2, keepdim=True)
        largest = groups.gather(2, at)
        rotated = self._rotate(groups.scatter(2, at, 0.0))
        scales = (rotated.abs().amax(dim=2, keepdim=True) * (_STRETCH / _LEVELS[-1])).bfloat16()
        place = ((rotated / _divisor(scales) + _REACH) * _FINE).clamp(0, 2 * _REACH * _FINE - 1)
        codes = _nearest_levels().to(states.device).index_select(0, place.int().flatten()).view(len(states), -1)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return packed, scales[..., 0], largest[..., 0].bfloat16(), at[..., 0].to(torch.uint8)

    def _decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["codes"].flatten().int()
        levels = torch.from_numpy(_level_pairs().index_select(0, codes).numpy().view(np.float32))
        rotated = levels.view(-1, self.width // self.group, self.group) * parts["scales"].float()[..., None]
        groups = rotated @ self._back()
        groups.scatter_(2, parts["largest_at"].long()[..., None], parts["largest"].float()[..., None])
        return groups.flatten(1)

    def sound(self, parts: Mapping[str, Tensor]) -> bool:
        return super().sound(parts) and bool((parts["largest_at"] < self.group).all())

    def _rotate(self, groups: Tensor) -> Tensor:
        """fp32 [n, groups, channels] times the rotation. Additions in a fixed order, no matrix product: neither the
        batch nor the device shows in the bytes."""
        rotated = groups * _signs(self.group).to(groups.device)
        for _ in range(self.group.bit_length() - 1):
            first, second = rotated[..., 0::2], rotated[..., 1::2]
            rotated = torch.cat((first + second, first - second), dim=-1)
        return rotated * self.group**-0.5

    def _back(self) -> Tensor:
        """fp32 [channels, channels]: the inverse of the rotation."""
        return _sums(self.group) * _signs(self.group) * self.group**-0.5


QUANTISATIONS: dict[str, type[Quantiser]] = {"int4": Int4, "int8": Int8, "fp8": Fp8}  # by `cache.quantisation`


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other, as bytes: not every device joins every type."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


def _divisor(scales: Tensor) -> Tensor:
    """``scales`` in fp32, with 1 where a state is zero."""
    return torch.where(scales > 0, scales, 1).float()


@functools.cache
def _signs(size: int) -> Tensor:
    """±1 [size], the same for ever: a state that is the same in all channels must not become a single number."""
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
    """All 16, ascending, fp32."""
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


@functools.cache
def _fp8_values() -> Tensor:
    """fp32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
