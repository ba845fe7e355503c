"""DeepSpec's target cache, version 2: where every byte lies.

A cache is a folder with `manifest.json`, `samples.idx` (one fixed record a sample) and `shard-NNNNN.bin`.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from nemotron_dspark.cache.layout import (
    INDEX,
    Layout,
    ManifestFile,
    Sample,
    manifest_of,
    require_index_size,
    split_into_shards,
    validated_manifest,
)
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json

VERSION = 2
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
RECORD_SIZE = struct.calcsize("<QIIQQQQQ")
FIELDS = ("input_ids", "attention_mask", "loss_mask", "taps", "last")  # in the order of a sample's bytes
_TYPES = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}
_REMEDY = "Build the cache again with `nds cache build`."


def shard_name(shard_id: int) -> str:
    return f"shard-{shard_id:05d}.bin"


def bytes_per_token(num_taps: int, hidden_size: int) -> int:
    """int32 id, two uint8 masks, and bf16 [T·H] + [H]."""
    return 4 + 1 + 1 + 2 * hidden_size * (num_taps + 1)


def field_sizes(length: int, num_taps: int, hidden_size: int) -> tuple[int, ...]:
    """Bytes of each of `FIELDS` in a sample of ``length`` tokens."""
    return 4 * length, length, length, 2 * length * num_taps * hidden_size, 2 * length * hidden_size


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    shard_id: int
    file_name: str = Field(pattern=r"^[\w.-]+$")


class _ManifestFile(ManifestFile):
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


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json`. ``extra`` holds what DeepSpec writes beside the required fields, and what others may add."""

    num_samples: int
    taps: tuple[int, ...]  # layer ids, ascending
    hidden_size: int
    shard_files: tuple[str, ...]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def target_name(self) -> str | None:
        return self.extra.get("target_model_name_or_path")

    def to_bytes(self) -> bytes:
        """The file as DeepSpec writes it: keys sorted, two spaces, no newline at the end."""
        values = {
            **self.extra,
            **_TYPES,
            "version": VERSION,
            "num_samples": self.num_samples,
            "num_shards": len(self.shard_files),
            "target_layer_ids": list(self.taps),
            "index_record_size": RECORD_SIZE,
            "hidden_size": self.hidden_size,
            "shards": [{"shard_id": i, "file_name": name} for i, name in enumerate(self.shard_files)],
        }
        return json.dumps(values, indent=2, sort_keys=True).encode()

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """The manifest of ``folder``; `InputError` names the file and the field that is missing or impossible."""
        path = manifest_of(folder)
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path} does not hold a JSON object.", _REMEDY)
        if "format" in values:
            raise InputError(
                f"{folder} is a cache in the format {values['format']}, not in DeepSpec's.",
                f"Make one that DeepSpec reads: nds cache convert {folder} OUT --to deepspec.",
            )
        found = validated_manifest(path, values, _ManifestFile, _REMEDY)
        names = tuple(shard.file_name for shard in found.shards)
        return Manifest(
            found.num_samples, tuple(found.target_layer_ids), found.hidden_size, names, found.model_extra or {}
        )


class DeepSpecLayout(Layout):
    """Samples one after the other, each with its ids, masks and bf16 hidden states."""

    label = "deepspec, bf16"
    mask_field = FIELDS.index("loss_mask")

    def __init__(
        self,
        index: np.ndarray,  # RECORD [samples]
        manifest: Manifest,
        shard_sizes: Sequence[int],
    ):
        self.records = index
        self.lengths = index["seq_len"].astype(np.int64)
        self.shards = index["shard_id"].astype(np.int64)
        self.shard_files = manifest.shard_files
        self.shard_sizes = tuple(shard_sizes)
        self.taps = manifest.taps
        self.hidden_size = manifest.hidden_size
        self.extra = manifest.extra
        self._manifest = manifest

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

    def index(self) -> bytes:
        return self.records.tobytes()

    def manifest(self) -> bytes:
        return self._manifest.to_bytes()

    def check_files(self, folder: Path) -> list[str]:
        """One sentence for each shard that is missing and each record that cannot be true (at most 20 records)."""
        index, sizes = self.records, self.shard_sizes
        names = zip(self.shard_files, sizes, strict=True)
        faults = [f"The shard {folder / name} is missing." for name, size in names if size < 0]
        numbers = np.arange(len(index))
        wrong = index["sample_id"] != numbers
        outside = index["shard_id"] >= len(sizes)
        empty = index["seq_len"] == 0
        shard_size = np.asarray([*sizes, 0], dtype=np.int64)[np.where(outside, len(sizes), index["shard_id"])]
        short = np.zeros(len(index), dtype=bool)
        per_token = field_sizes(1, len(self.taps), self.hidden_size)
        for name, size in zip(FIELDS, per_token, strict=True):
            short |= index[name].astype(np.float64) + size * index["seq_len"].astype(np.float64) > shard_size
        short &= shard_size >= 0  # a missing shard has been named
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
        offsets = np.cumsum(sizes) - sizes - before[shards]
        index = np.zeros(len(lengths), dtype=RECORD)
        index["sample_id"] = np.arange(len(lengths))
        index["shard_id"] = shards
        index["seq_len"] = lengths
        for name, per_field in zip(FIELDS, field_sizes(1, len(taps), hidden_size), strict=True):
            index[name] = offsets
            offsets = offsets + per_field * lengths
        names = tuple(map(shard_name, range(len(shard_sizes))))
        manifest = Manifest(len(lengths), tuple(taps), hidden_size, names, extra or {})
        return DeepSpecLayout(index, manifest, shard_sizes.tolist())

    @staticmethod
    def read(folder: Path) -> "DeepSpecLayout":
        """The layout of the cache in ``folder``, ours or DeepSpec's; whether it can be true is for `check_files`.

        Raises:
            InputError: manifest or index is missing or malformed.
        """
        manifest = Manifest.read(folder)
        require_index_size(folder / INDEX, manifest.num_samples * RECORD.itemsize, manifest.num_samples)
        paths = [folder / name for name in manifest.shard_files]
        sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
        return DeepSpecLayout(np.fromfile(folder / INDEX, dtype=RECORD), manifest, sizes)


def _bf16_bits(tensor: Tensor) -> np.ndarray:  # uint16, same shape
    return tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy()
