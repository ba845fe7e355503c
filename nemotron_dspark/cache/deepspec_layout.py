"""DeepSpec's target cache, version 2: where every byte lies.

A cache is a folder with `manifest.json`, `samples.idx` (one fixed record a sample) and `shard-NNNNN.bin`.
"""

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
from nemotron_dspark.errors import InputError

Number = TypeVar("Number", int, np.ndarray)

RECORD = np.dtype(
    [
        ("sample_id", "<u8"),
        ("shard_id", "<u4"),
        ("seq_len", "<u4"),
        ("input_ids", "<u8"),  # from here on: byte offsets inside the shard
        ("attention_mask", "<u8"),
        ("loss_mask", "<u8"),
        ("taps", "<u8"),
        ("last", "<u8"),
    ]
)
FIELDS = ("input_ids", "attention_mask", "loss_mask", "taps", "last")  # in the order of a sample's bytes
_REMEDY = "Build the cache again with `nds cache build`."


def shard_name(shard_id: int) -> str:
    return f"shard-{shard_id:05d}.bin"


def field_sizes(length: Number, num_taps: int, hidden_size: int) -> tuple[Number, ...]:
    """Bytes of each of `FIELDS` in a sample of ``length`` tokens: int32 ids, two uint8 masks, bf16 [T·H] and [H]."""
    return 4 * length, length, length, 2 * length * num_taps * hidden_size, 2 * length * hidden_size


def bytes_per_token(num_taps: int, hidden_size: int) -> int:
    return sum(field_sizes(1, num_taps, hidden_size))


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    shard_id: int
    file_name: str = Field(pattern=r"^[\w.-]+$")


class Manifest(ManifestFile):
    """`manifest.json`, the fields that DeepSpec requires."""

    version: Literal[2]
    hidden_dtype: Literal["bfloat16"]
    token_dtype: Literal["int32"]
    mask_dtype: Literal["uint8"]
    index_record_size: Literal[56]
    num_samples: int = Field(ge=0)
    shards: list[_Shard]
    num_shards: int

    @field_validator("num_shards")
    @classmethod
    def _counted(cls, count: int, info: ValidationInfo) -> int:
        shards = info.data.get("shards", [])
        if [shard.shard_id for shard in shards] != list(range(count)):
            raise ValueError(f"there are {len(shards)} shards, and their ids must count from 0")
        return count

    @property
    def shard_files(self) -> list[str]:
        return [shard.file_name for shard in self.shards]

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """The manifest of ``folder``; `InputError` names the file and the field that is missing or impossible."""
        values, path = read_manifest(folder), folder / MANIFEST
        if not isinstance(values, dict):
            raise InputError(f"{path} does not hold a JSON object.", _REMEDY)
        if "format" in values:
            raise InputError(
                f"{folder} is a cache in the format {values['format']}, not in DeepSpec's.",
                f"Make one that DeepSpec reads: nds cache convert {folder} --out OUT --to deepspec.",
            )
        return Manifest.of(values, path, _REMEDY)


class DeepSpecLayout(Layout):
    """Samples one after the other, each with its ids, masks and bf16 hidden states."""

    label = "deepspec, bf16"
    mask_field = FIELDS.index("loss_mask")

    def __init__(
        self,
        records: np.ndarray,  # RECORD [samples]
        shard_files: Sequence[str],
        shard_sizes: Sequence[int],
        *,
        taps: Sequence[int],
        hidden_size: int,
        extra: Mapping[str, Any] | None = None,
    ):
        self.records = records
        self.lengths, self.shards = records["seq_len"].astype(np.int64), records["shard_id"].astype(np.int64)
        self.shard_files, self.shard_sizes = tuple(shard_files), tuple(shard_sizes)
        self.taps, self.hidden_size, self.extra = tuple(taps), hidden_size, extra or {}

    def fields(self, sample_id: int) -> list[tuple[int, int]]:
        record = self.records[sample_id]
        sizes = field_sizes(int(record["seq_len"]), len(self.taps), self.hidden_size)
        return [(int(record[name]), size) for name, size in zip(FIELDS, sizes, strict=True)]

    def encode(
        self, sample_id: int, input_ids: np.ndarray, loss_mask: np.ndarray, taps: Tensor, last: Tensor
    ) -> tuple[np.ndarray, ...]:
        return (
            np.ascontiguousarray(input_ids, dtype="<i4"),
            np.ones(len(input_ids), dtype=np.uint8),
            np.ascontiguousarray(loss_mask, dtype=np.uint8),
            _bf16_bits(taps),
            _bf16_bits(last),
        )

    def decode(self, sample_id: int, fields: Sequence[np.ndarray]) -> Sample:
        length = int(self.lengths[sample_id])
        ids, _, loss, taps, last = fields
        return Sample(
            torch.from_numpy(ids.view("<i4").astype(np.int64)),
            torch.from_numpy(loss != 0),
            torch.from_numpy(taps).view(torch.bfloat16).view(length, -1),
            torch.from_numpy(last).view(torch.bfloat16).view(length, -1),
        )

    def faults(self, sample_id: int, fields: Sequence[np.ndarray]) -> list[str]:
        ids, attention, loss, *states = fields
        faults = []
        if (ids.view("<i4") < 0).any():
            faults.append("has a negative token id")
        if (attention != 1).any() or (loss > 1).any():
            faults.append("has a mask with values other than 0 and 1, or padding")
        # bfloat16 with all exponent bits set is an infinity or not a number
        if any(((bits.view("<u2") & 0x7F80) == 0x7F80).any() for bits in states):
            faults.append("has hidden states that are not finite")
        return faults

    def described(self) -> dict[str, Any]:
        return {
            "version": 2,
            "hidden_dtype": "bfloat16",
            "token_dtype": "int32",
            "mask_dtype": "uint8",
            "index_record_size": RECORD.itemsize,
            "num_shards": len(self.shard_files),
            "shards": [{"shard_id": i, "file_name": name} for i, name in enumerate(self.shard_files)],
        }

    def check_files(self, folder: Path) -> list[str]:
        """One sentence for each shard that is missing and each record that cannot be true (at most 20 records)."""
        index, sizes = self.records, self.shard_sizes
        names = zip(self.shard_files, sizes, strict=True)
        faults = [f"The shard {folder / name} is missing." for name, size in names if size < 0]
        wrong = index["sample_id"] != np.arange(len(index))
        outside = index["shard_id"] >= len(sizes)
        empty = index["seq_len"] == 0
        shard_size = np.asarray([*sizes, 0], dtype=np.int64)[np.where(outside, len(sizes), index["shard_id"])]
        field_bytes = field_sizes(index["seq_len"].astype(np.float64), len(self.taps), self.hidden_size)
        ends = [index[name].astype(np.float64) + size for name, size in zip(FIELDS, field_bytes, strict=True)]
        short = (np.max(ends, axis=0) > shard_size) & (shard_size >= 0)  # a missing shard has been named
        for sample in np.flatnonzero(wrong | outside | empty | short)[:20].tolist():
            where = f"{folder / INDEX}: sample {sample}"
            if wrong[sample]:
                faults.append(f"{where} has the id {index['sample_id'][sample]}; ids must be dense.")
            elif outside[sample]:
                faults.append(f"{where} lies in shard {index['shard_id'][sample]}; there are {len(sizes)}.")
            elif empty[sample]:
                faults.append(f"{where} is empty.")
            else:
                name = self.shard_files[index["shard_id"][sample]]
                faults.append(f"{folder / name} is too short for sample {sample}: it has {shard_size[sample]} bytes.")
        return faults

    @staticmethod
    def of(
        lengths: Sequence[int] | np.ndarray,
        *,
        taps: Sequence[int],
        hidden_size: int,
        shard_bytes: int,
        extra: Mapping[str, Any] | None = None,
    ) -> "DeepSpecLayout":
        """The layout of samples of these ``lengths``, as DeepSpec would write it with this limit of a shard."""
        lengths = np.asarray(lengths, dtype=np.int64)
        sizes = bytes_per_token(len(taps), hidden_size) * lengths
        shards = split_into_shards(sizes, shard_bytes)
        shard_sizes = np.bincount(shards, weights=sizes).astype(np.int64)
        before = np.concatenate([[0], np.cumsum(shard_sizes)])
        index = np.zeros(len(lengths), dtype=RECORD)
        index["sample_id"], index["shard_id"], index["seq_len"] = np.arange(len(lengths)), shards, lengths
        offsets = np.cumsum(sizes) - sizes - before[shards]
        for name, size in zip(FIELDS, field_sizes(lengths, len(taps), hidden_size), strict=True):
            index[name] = offsets
            offsets = offsets + size
        names = map(shard_name, range(len(shard_sizes)))
        return DeepSpecLayout(
            index, tuple(names), shard_sizes.tolist(), taps=taps, hidden_size=hidden_size, extra=extra
        )

    @staticmethod
    def read(folder: Path) -> "DeepSpecLayout":
        """The layout of the cache in ``folder``, ours or DeepSpec's; whether it can be true is for `check_files`.

        Raises:
            InputError: manifest or index is missing or malformed.
        """
        manifest = Manifest.read(folder)
        paths = [folder / name for name in manifest.shard_files]
        sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
        return DeepSpecLayout(
            read_index(folder, RECORD, manifest.num_samples),
            manifest.shard_files,
            sizes,
            taps=manifest.target_layer_ids,
            hidden_size=manifest.hidden_size,
            extra=manifest.extra,
        )


def _bf16_bits(tensor: Tensor) -> np.ndarray:  # uint16, same shape
    return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
