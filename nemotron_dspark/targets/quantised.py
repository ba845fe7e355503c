"""Quantised checkpoints, read as the BF16 weights that they stand for, one tensor at a time.

What a weight is follows from what lies beside it: one in float8 or in packed float4 has its scales in tensors named
after it, one that the quantiser left alone has none.

    FP8     w = e4m3 * scale                         a scale for the tensor, a row or a block
    NVFP4   w = e2m1 * (e4m3 scale * second)         16 values of a row share a scale, the tensor shares the second
    MXFP4   w = e2m1 * 2^(byte - 127)                32 values of a row; MXFP8 likewise with e4m3

Products are taken in fp32 and rounded to BF16 once. docs/targets.md has the tensors' names and the sources.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.schemes import READ, Scheme, unread
from nemotron_dspark.targets.shards import Shard, Stored

_UNSCALED = {"F64", "F32", "F16", "BF16"}
_EXPONENTS = {"U8", "F8_E8M0"}  # types of a scale that is a power of two
# What is not a weight's: scales of activations and of the cache of keys and values.
_RUNNING = re.compile(r"(^|[._])(input|output|activation|[qkv])(_global)?_(scale|zero_point)$")
# What changes a weight's meaning beyond its scales: a factor per input (AWQ), low-rank terms (SVDQuant), offsets.
_UNDONE = re.compile(r"(pre_quant_scale|svdquant_lora_[ab]|_zero_point|_g_idx)$")
_SCALES = ("_scale", "_scale_inv", "_weight_scale", "_scales", "_scale_2", "_weight_scale_2", "_global_scale")
_CHUNK = 1 << 22  # values dequantised at a time: what is needed beside the result is small

_EIGHT_BITS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_FOUR_BITS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FOUR_BITS = torch.cat([_FOUR_BITS, -_FOUR_BITS])


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """How the values of a quantised weight and its scales belong together."""

    words: str
    table: Tensor  # what each code stands for
    shape: tuple[int, ...]  # [..., R, C] of the values
    grid: tuple[int, ...]  # [..., r, c] of the scales; 1 where all share one
    block: tuple[int, int]  # rows and columns that share one


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of a quantised checkpoint as the model knows it, quantised or not."""

    name: str
    values: Stored
    scheme: Scheme
    scale: Stored | None = None
    second: Stored | None = None
    divides: bool = False  # by the second scale, rather than to multiply

    @property
    def shard(self) -> Shard:
        return self.values.shard

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is read."""
        shape = self.values.shape
        if self.values.dtype != "U8":
            return shape
        if self._in_blocks:
            return (*shape[:-3], 2 * shape[-2] * shape[-1], shape[-3])
        return (*shape[:-1], 2 * shape[-1])

    @property
    def _in_blocks(self) -> bool:
        return self.values.name.endswith("_blocks")

    def layout(self) -> ScaleLayout | None:
        """How it is quantised, from the headers of the files alone; None when it is not.

        Raises:
            InputError: its scale is missing or has an impossible shape, or its type is not read here.
        """
        kind, where = self.values.dtype, f"{self.values.name} in {self.shard.path}"
        if kind in _UNSCALED and self.scale is not None:
            raise InputError(
                f"{where} is stored as {kind} with scales beside it, so it is not yet quantised or not any more.",
                "Save the checkpoint compressed, or remove the scales and quantization_config.",
            )
        if self.scale is None and not _small(kind):
            return None
        if kind not in ("F8_E4M3", "U8"):
            raise InputError(f"{where} is stored as {kind}, which is not read here.", READ)
        if self.scale is None or (self.second is None and (kind, self.scale.dtype) == ("U8", "F8_E4M3")):
            raise InputError(
                f"{where} is quantised, and its {'second ' if self.scale else ''}scale is missing.",
                "Download the whole checkpoint again.",
            )
        fits = self._float4(self.scale) if kind == "U8" else self._float8(self.scale)
        if fits is None:
            raise InputError(
                f"The scales {self.scale.name} of shape {self.scale.shape} do not fit {where}, which has shape "
                f"{self.values.shape}.",
                "Download the checkpoint again, and check that config.json is the one it came with.",
            )
        return fits

    def _float8(self, scale: Stored) -> ScaleLayout | None:
        """One scale for all, for a row, for a block; in a stack of experts, for each expert."""
        if len(self.values.shape) < 2 or self.second is not None:
            return None
        *lead, rows, columns = self.values.shape
        powers = scale.dtype in _EXPONENTS
        one = "one power of two" if powers else "one scale"

        def made(share: str, grid: tuple[int, ...], block: tuple[int, int]) -> ScaleLayout:
            name = "MXFP8" if powers and block == (1, 32) else "FP8"
            return ScaleLayout(f"{name} (e4m3, {one} per {share})", _EIGHT_BITS, self.values.shape, grid, block)

        if math.prod(scale.shape) == 1:
            return made("tensor", (1,) * (len(lead) + 2), (rows, columns))
        if lead and scale.shape in ((*lead,), (*lead, 1), (*lead, 1, 1)):
            return made("expert", (*lead, 1, 1), (rows, columns))
        if scale.shape in ((*lead, rows), (*lead, rows, 1)):
            return made("row", (*lead, rows, 1), (1, columns))
        for high, wide in (*self.scheme.blocks, *([(1, 32)] if powers else [])):
            down, across = math.ceil(rows / high), math.ceil(columns / wide)
            if scale.shape in ((*lead, down, across), (*lead, down, 1, across, 1)):  # the latter is ModelOpt's
                return made(f"{high}x{wide} block", (*lead, down, across), (high, wide))
        return None

    def _float4(self, scale: Stored) -> ScaleLayout | None:
        """Two values in a byte; by its type, a scale belongs to 16 of them or to 32."""
        shape = self.values.shape
        if self._in_blocks and len(shape) > 2:
            shape = (*shape[:-2], shape[-2] * shape[-1])
        if len(shape) < 2:
            return None
        shape = (*shape[:-1], 2 * shape[-1])
        share = 16 if scale.dtype == "F8_E4M3" else 32 if scale.dtype in _EXPONENTS else 0
        if not share or shape[-1] % share or scale.shape != (*shape[:-1], shape[-1] // share):
            return None
        if share == 32:
            words, whole = "MXFP4 (e2m1, one power of two per 32 values)", self.second is None
        else:
            words = "NVFP4 (e2m1, one e4m3 scale per 16 values and one more per tensor)"
            whole = self.second is not None and math.prod(self.second.shape) in (1, math.prod(shape[:-2]))
        if not whole:
            return None
        return ScaleLayout(words, _FOUR_BITS, shape, scale.shape, (1, share))

    def read(self) -> Tensor:
        """The weight: in its own type when it is not quantised, else dequantised in fp32 and rounded to BF16.

        Raises:
            InputError: as `layout`, or a file is missing or damaged.
        """
        layout = self.layout()
        return self.values.read() if layout is None else self._decoded(layout, layout.table)

    def rounding(self) -> float:
        """The share of the weight's root mean square that quantising it is likely to have cost.

        What was rounded is not known any more. If it lay evenly in the cell of each value, the half-way points to the
        neighbours a below and b above, the mean square error there is (a³ + b³) / 3(a + b), times the scale's square.
        """
        layout = self.layout()
        if layout is None:
            return 0.0
        error, weight = (self._decoded(layout, table).float() for table in (_cells(layout.table), layout.table))
        return float(error.square().mean().sqrt() / weight.square().mean().sqrt().clamp(min=1e-30))

    def _decoded(self, layout: ScaleLayout, table: Tensor) -> Tensor:
        """What ``table`` has for each code, times its scale, in BF16; [..., R, C], gpt-oss's blocks [..., C, R]."""
        *lead, rows, columns = layout.shape
        scales = self._scales(layout)
        if layout.block[0] > 1 and layout.grid[-2] > 1:
            scales = scales.repeat_interleave(layout.block[0], -2)[..., :rows, :]
        scales = scales.expand(*lead, rows, -1).reshape(-1, layout.grid[-1])
        codes = self.values.read().view(torch.uint8)
        packed = codes.numel() < math.prod(layout.shape)
        codes = codes.reshape(len(scales), -1)
        weight = torch.empty(len(scales), columns, dtype=torch.bfloat16)
        step = max(1, _CHUNK // columns)
        for start in range(0, len(scales), step):
            part = slice(start, start + step)
            found, factor = codes[part], scales[part]
            if packed:  # the low half of a byte is the first value
                found = torch.stack((found & 15, found >> 4), -1).flatten(-2)
            if layout.grid[-1] > 1:
                factor = factor.repeat_interleave(layout.block[1], -1)[:, :columns]
            weight[part] = table[found.int()] * factor
        weight = weight.view(layout.shape)
        return weight.transpose(-1, -2).contiguous() if self._in_blocks else weight

    def _scales(self, layout: ScaleLayout) -> Tensor:
        """The scales as one grid in fp32."""
        if self.scale is None:
            raise ValueError(f"{self.name} has no scale")
        found = self.scale.read()
        scales = (found.view(torch.float8_e8m0fnu) if found.dtype == torch.uint8 else found).float()
        scales = scales.reshape(layout.grid)
        if self.second is None:
            return scales
        second = self.second.read().float()
        second = second.reshape(()) if second.numel() == 1 else second.reshape(*layout.shape[:-2], 1, 1)
        return scales / second if self.divides else scales * second


def _small(kind: str) -> bool:
    """True for types that hold no weight without a scale."""
    return kind in ("U8", "I8") or kind.startswith(("F8", "F4", "F6"))


def _cells(table: Tensor) -> Tensor:
    """The root mean square distance to each value of ``table`` from what is rounded to it."""
    steps = table[table.isfinite()].unique()
    halves = steps.diff() / 2
    below, above = torch.cat([halves[:1], halves]), torch.cat([halves, halves[-1:]])
    mean = (below**3 + above**3) / (3 * (below + above))
    places = torch.searchsorted(steps, table.nan_to_num()).clamp(max=len(steps) - 1)
    return mean.sqrt()[places]


def weights_of(stored: Mapping[str, Stored], scheme: Scheme) -> dict[str, Weight]:
    """The weights that the tensors ``stored`` stand for, by the model's names; scales go with what they scale.

    Raises:
        InputError: there are tensors that change a weight in a way that is not undone here.
    """
    found: dict[str, Weight] = {}
    for name, tensor in stored.items():
        if is_running(name) or _scales_another(name, stored):
            continue
        if _UNDONE.search(name):
            raise unread(tensor.shard.path.parent, f"tensors such as {name}")
        base = re.sub("_(packed|blocks)$", "", name)
        scale = _beside(stored, base, "_scale", "_scale_inv", "_weight_scale", "_scales")
        if scale is None:
            base = name
        times, over = _beside(stored, base, "_scale_2", "_weight_scale_2"), _beside(stored, base, "_global_scale")
        found[base] = Weight(base, tensor, scheme, scale, times or over, divides=times is None)
    return found


def is_running(name: str) -> bool:
    """True for scales of activations and of cached keys and values, which are no weights' and are not used."""
    return bool(_RUNNING.search(name))


def _beside(stored: Mapping[str, Stored], base: str, *endings: str) -> Stored | None:
    return next((stored[base + ending] for ending in endings if base + ending in stored), None)


def _scales_another(name: str, stored: Mapping[str, Stored]) -> bool:
    bases = (name.removesuffix(ending) for ending in _SCALES if name.endswith(ending))
    return any(base + form in stored for base in bases for form in ("", "_packed", "_blocks"))
