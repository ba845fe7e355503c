"""The compact cache: safetensors shards of packed sequences whose hidden states are quantised.

A shard holds its samples packed, one after the other in every tensor; `cu_seqlens` says where each begins. Last hidden
states are kept only at positions from which a slot can be predicted; `cu_last` says where those of each sample begin.
Beside the shards lie `manifest.json` and `samples.idx`, the numbers of tokens and of kept last states of every sample:
they decide every byte of the shards that is not a sample's.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from nemotron_dspark.cache.layout import (
    INDEX,
    MANIFEST,
    Layout,
    ManifestFile,
    Sample,
    read_index,
    read_manifest,
    split_into_shards,
)
from nemotron_dspark.cache.quantise import Component, Int4
from nemotron_dspark.chat.mask import predicts_loss_token
from nemotron_dspark.errors import InputError

Count = TypeVar("Count", int, np.ndarray)

FORMAT = "nds-compact"
VERSION = 1
QUANTISATION = "int4"  # what `quantise` does, in manifests and headers
RECORD = np.dtype([("tokens", "<u4"), ("last", "<u4")])
_NAMES = {  # dtypes as a safetensors header spells them
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
_REMEDY = "Build the cache again with `nds cache build --cache-format compact`."


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    file_name: str
    num_samples: int = Field(gt=0)


class _ManifestFile(ManifestFile):
    format: str
    version: Literal[1]
    quantisation: str
    shards: list[_Shard]
    num_samples: int

    @field_validator("num_samples")
    @classmethod
    def _counted(cls, count: int, info: ValidationInfo) -> int:
        if (stored := sum(shard.num_samples for shard in info.data.get("shards", []))) != count:
            raise ValueError(f"the shards hold {stored}")
        return count


@dataclasses.dataclass(frozen=True)
class Column:
    """One tensor of every shard."""

    name: str
    dtype: torch.dtype
    row: tuple[int, ...]  # shape of one row
    of_last: bool = False  # it has a row for each last state that is kept, not for each token

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row) * self.dtype.itemsize


class CompactLayout(Layout):
    """Samples packed into the tensors of safetensors files."""

    label = f"compact, {QUANTISATION}"

    def __init__(
        self,
        records: np.ndarray,  # RECORD [samples]
        shards: np.ndarray,  # int64 [samples], ascending
        *,
        taps: Sequence[int],
        hidden_size: int,
        extra: Mapping[str, Any] | None = None,
    ):
        self.records, self.shards = records, shards
        self.taps, self.hidden_size, self.extra = tuple(taps), hidden_size, extra or {}
        # [samples, 2], indexed by `Column.of_last`: rows of a sample in columns of tokens, and in those of last states
        self._rows = np.stack([records["tokens"], records["last"]], axis=1).astype(np.int64)
        self.lengths, self.kept = self._rows.T
        self._quantiser = Int4(hidden_size)
        self.columns = columns(len(self.taps), self._quantiser.parts)
        self.mask_field = [column.name for column in self.columns].index("loss_mask")
        count = int(shards[-1]) + 1 if len(shards) else 0
        self._bounds = np.searchsorted(shards, np.arange(count + 1))  # first sample of each shard
        before = np.cumsum(self._rows, axis=0) - self._rows
        self._before = before - before[self._bounds[:-1]][shards]  # [samples, 2], rows before it in its shard
        self.shard_files = tuple(f"shard-{number:05d}.safetensors" for number in range(count))
        ends = [self._header(shard)[1] for shard in range(count)]
        self._starts = [offsets[:-1] for offsets in ends]
        self.shard_sizes = tuple(offsets[-1] for offsets in ends)

    def fields(self, sample_id: int) -> list[tuple[int, int]]:
        starts = self._starts[int(self.shards[sample_id])]
        rows, before = self._rows[sample_id].tolist(), self._before[sample_id].tolist()
        return [
            (start + before[column.of_last] * column.row_bytes, rows[column.of_last] * column.row_bytes)
            for column, start in zip(self.columns, starts, strict=True)
        ]

    def encode(
        self, sample_id: int, input_ids: np.ndarray, loss_mask: np.ndarray, taps: Tensor, last: Tensor
    ) -> list[np.ndarray]:
        used = torch.from_numpy(predicts_loss_token(loss_mask))
        if used.sum() != self.kept[sample_id]:
            raise ValueError(f"sample {sample_id} has {used.sum()} last states, not {self.kept[sample_id]}")
        states = taps.detach().reshape(-1, self.hidden_size)  # a state for each token and tap
        kept = last.detach()[:-1][used.to(last.device)]
        found = {
            "input_ids": np.ascontiguousarray(input_ids, dtype="<i4"),
            "loss_mask": np.ascontiguousarray(loss_mask, dtype=np.uint8),
            **self._encoded("taps", states),
            **self._encoded("last", kept),
        }
        return [found[column.name] for column in self.columns]

    def decode(self, sample_id: int, fields: Sequence[np.ndarray]) -> Sample:
        found = self._tensors(fields)
        loss = found["loss_mask"] != 0
        last = torch.zeros(len(loss), self.hidden_size, dtype=torch.bfloat16)
        last[:-1][predicts_loss_token(loss)] = self._quantiser.decode(_parts_of("last", found))
        return Sample(
            found["input_ids"].long(),
            loss,
            self._quantiser.decode(_parts_of("taps", found)).view(len(loss), -1),
            last,
        )

    def faults(self, sample_id: int, fields: Sequence[np.ndarray]) -> list[str]:
        found = self._tensors(fields)
        faults = []
        if (found["input_ids"] < 0).any():
            faults.append("has a negative token id")
        if (found["loss_mask"] > 1).any():
            faults.append("has a mask with values other than 0 and 1")
        if int(predicts_loss_token(found["loss_mask"]).sum()) != int(self.kept[sample_id]):
            faults.append("has another loss mask than its last hidden states were chosen by")
        if not all(self._quantiser.sound(_parts_of(states, found)) for states in ("taps", "last")):
            faults.append("has hidden states that are not finite or cannot be decoded")
        return faults

    def preamble(self, shard: int) -> bytes:
        """The safetensors header and the two tensors that say where samples begin."""
        rows = self._rows[self._bounds[shard] : self._bounds[shard + 1]]
        starts = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(rows, axis=0)])
        return self._header(shard)[0] + starts.T.astype("<i8").tobytes()

    def described(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "quantisation": QUANTISATION,
            "shards": [
                {"file_name": name, "num_samples": int(samples)}
                for name, samples in zip(self.shard_files, np.diff(self._bounds), strict=True)
            ],
        }

    def check_files(self, folder: Path) -> list[str]:
        """One sentence for each shard that is missing, has not its size or does not begin as the index says."""
        faults = []
        for shard, (name, size) in enumerate(zip(self.shard_files, self.shard_sizes, strict=True)):
            path, preamble = folder / name, self.preamble(shard)
            if not path.is_file():
                faults.append(f"The shard {path} is missing.")
            elif path.stat().st_size != size:
                faults.append(f"{path} has {path.stat().st_size} bytes, not {size}.")
            else:
                with open(path, "rb") as file:
                    if file.read(len(preamble)) != preamble:
                        faults.append(f"{path} does not begin as {INDEX} says: one of the two is damaged.")
        return faults

    @staticmethod
    def of(
        lengths: Sequence[int] | np.ndarray,
        kept: Sequence[int] | np.ndarray,
        *,
        taps: Sequence[int],
        hidden_size: int,
        shard_bytes: int,
        extra: Mapping[str, Any] | None = None,
    ) -> "CompactLayout":
        """The layout of samples of these ``lengths``, of which ``kept`` last states are kept."""
        records = np.zeros(len(lengths), dtype=RECORD)
        records["tokens"], records["last"] = lengths, kept
        tokens, last = records["tokens"].astype(np.int64), records["last"].astype(np.int64)
        sizes = stored_bytes(tokens, last, num_taps=len(taps), hidden_size=hidden_size)
        shards = split_into_shards(sizes, shard_bytes)
        return CompactLayout(records, shards, taps=taps, hidden_size=hidden_size, extra=extra)

    @staticmethod
    def read(folder: Path) -> "CompactLayout":
        """The layout of the cache in ``folder``.

        Raises:
            InputError: manifest or index is missing or malformed, or its states are stored as something else than int4.
        """
        path = folder / MANIFEST
        found = _ManifestFile.of(read_manifest(folder), path, _REMEDY)
        if found.quantisation != QUANTISATION:
            raise InputError(
                f"{path}: its hidden states are stored as {found.quantisation!r}; only {QUANTISATION} is read.",
                "Build the cache again, or convert the cache in DeepSpec's format that it was made from.",
            )
        records = read_index(folder, RECORD, found.num_samples)
        wrong = np.flatnonzero((records["tokens"] == 0) | (records["last"] >= np.maximum(records["tokens"], 1)))
        if len(wrong):
            raise InputError(f"{folder / INDEX}: sample {wrong[0]} cannot have its number of tokens.", _REMEDY)
        counts = [shard.num_samples for shard in found.shards]
        layout = CompactLayout(
            records,
            np.repeat(np.arange(len(counts)), counts),
            taps=found.target_layer_ids,
            hidden_size=found.hidden_size,
            extra=found.extra,
        )
        if list(layout.shard_files) != [shard.file_name for shard in found.shards]:
            raise InputError(f"{path}: its shards are not named {layout.shard_files[0]} and so on.", _REMEDY)
        return layout

    def _header(self, shard: int) -> tuple[bytes, list[int]]:
        """The safetensors header of a shard; where in the file each column begins, and the file's size."""
        rows = self._rows[self._bounds[shard] : self._bounds[shard + 1]]
        shapes = [(name, torch.int64, [len(rows) + 1]) for name in ("cu_seqlens", "cu_last")]
        total = rows.sum(axis=0).tolist()
        shapes += [(column.name, column.dtype, [total[column.of_last], *column.row]) for column in self.columns]
        ends = np.cumsum([0, *(math.prod(shape) * dtype.itemsize for _, dtype, shape in shapes)]).tolist()
        header: dict[str, Any] = {
            "__metadata__": {"format": FORMAT, "version": str(VERSION), "quantisation": QUANTISATION}
        }
        for (name, dtype, shape), start, end in zip(shapes, ends[:-1], ends[1:], strict=True):
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # as the library does it: numbers behind it are aligned
        return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends[2:]]

    def _encoded(self, name: str, states: Tensor) -> dict[str, np.ndarray]:
        """States as bytes, by column name."""
        return {
            f"{name}.{part.name}": tensor.cpu().contiguous().view(torch.uint8).numpy()
            for part, tensor in zip(self._quantiser.parts, self._quantiser.encode(states), strict=True)
        }

    def _tensors(self, fields: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """The tensors of one sample by column name."""
        return {
            column.name: torch.from_numpy(field).view(column.dtype).view(-1, *column.row)
            if len(field)
            else torch.empty(0, *column.row, dtype=column.dtype)
            for column, field in zip(self.columns, fields, strict=True)
        }


def columns(num_taps: int, parts: Sequence[Component]) -> tuple[Column, ...]:
    """Every tensor that holds samples, ids first; wide numbers before narrow ones, so that all are aligned."""
    found = [
        Column("input_ids", torch.int32, ()),
        Column("loss_mask", torch.uint8, ()),
        *(Column(f"taps.{part.name}", part.dtype, (num_taps, part.columns)) for part in parts),
        *(Column(f"last.{part.name}", part.dtype, (part.columns,), of_last=True) for part in parts),
    ]
    return tuple(sorted(found, key=lambda column: -column.dtype.itemsize))


def stored_bytes(tokens: Count, kept: Count, samples: int = 1, *, num_taps: int, hidden_size: int) -> Count:
    """Bytes of ``samples`` with so many tokens and last states that are kept, and their entries in both `cu_…`.

    Numbers are for all of them together, arrays for samples each.
    """
    states = num_taps * tokens + kept
    return 16 * samples + (4 + 1) * tokens + Int4(hidden_size).state_bytes * states


def _parts_of(of: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of states as a quantiser takes them, [states, columns]."""
    return {
        name.removeprefix(f"{of}."): tensor.flatten(0, -2)
        for name, tensor in tensors.items()
        if name.startswith(f"{of}.")
    }
