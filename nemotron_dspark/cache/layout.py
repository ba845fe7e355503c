"""What a cache format is: where every byte of every sample lies, and how hidden states become bytes and back.

A layout follows from the samples' lengths and loss masks alone, so it is known before the target runs: samples can be
written in any order, by anybody, and a build that was killed ends in the same bytes.
"""

import abc
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from nemotron_dspark.config.validation import input_error
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json

MANIFEST = "manifest.json"
INDEX = "samples.idx"
WORK = ".build"  # inside a cache folder, removed when the cache is complete
RESTORE = "Restore the file or build the cache again; `nds cache verify` lists every fault."


@dataclasses.dataclass(frozen=True)
class Sample:
    input_ids: Tensor  # int64 [S]
    loss_mask: Tensor  # bool [S]
    taps: Tensor  # bf16 [S, T·H], raw outputs of the tapped layers, ascending
    last: Tensor  # bf16 [S, H], after the target's final norm


class Layout(abc.ABC):
    """One cache in one format. Fields of a sample are given in a fixed order; the first holds its int32 ids."""

    label: str  # the format in a few words
    records: np.ndarray  # [samples], content of `samples.idx`
    lengths: np.ndarray  # int64 [samples], tokens of each
    shards: np.ndarray  # int64 [samples], shard of each; none across two
    shard_files: tuple[str, ...]
    shard_sizes: tuple[int, ...]  # bytes
    taps: tuple[int, ...]  # layer ids, ascending
    hidden_size: int
    mask_field: int  # which of the fields holds the loss mask, a byte a token
    extra: Mapping[str, Any]  # what the manifest holds beside the layout

    def sample_bytes(self, sample_id: int) -> int:
        return sum(size for _, size in self.fields(sample_id))

    @abc.abstractmethod
    def fields(self, sample_id: int) -> Sequence[tuple[int, int]]:
        """Offset in its shard, and bytes, of each field of a sample."""

    @abc.abstractmethod
    def encode(
        self,
        sample_id: int,
        input_ids: np.ndarray,  # int [S]
        loss_mask: np.ndarray,  # bool or uint8 [S]
        taps: Tensor,  # [S, T·H]
        last: Tensor,  # [S, H]
    ) -> Sequence[np.ndarray]:
        """What lies in each of `fields`, contiguous arrays."""

    @abc.abstractmethod
    def decode(self, sample_id: int, fields: Sequence[np.ndarray]) -> Sample:
        """The sample whose ``fields`` (uint8 each) were read; it may keep their memory."""

    @abc.abstractmethod
    def faults(self, sample_id: int, fields: Sequence[np.ndarray]) -> list[str]:
        """What cannot be true of the values in ``fields``; each completes "sample N …"."""

    def preamble(self, shard: int) -> bytes:
        """What a shard begins with, before its first sample."""
        return b""

    @abc.abstractmethod
    def described(self) -> dict[str, Any]:
        """What `manifest.json` says of this format and its shards."""

    def manifest(self) -> bytes:
        """Content of `manifest.json` as DeepSpec writes it: keys sorted, two spaces, no newline at the end."""
        values = {
            **self.extra,
            **self.described(),
            "num_samples": len(self.records),
            "target_layer_ids": list(self.taps),
            "hidden_size": self.hidden_size,
        }
        return json.dumps(values, indent=2, sort_keys=True).encode()

    @abc.abstractmethod
    def check_files(self, folder: Path) -> list[str]:
        """One sentence for each shard in ``folder`` that is missing or cannot hold what it should."""


def read_manifest(folder: Path) -> Any:
    """`manifest.json` of the cache in ``folder``.

    Raises:
        InputError: there is none, which says whether the cache is unfinished; or it is not JSON.
    """
    path = folder / MANIFEST
    if path.is_file():
        return read_json(path)
    if (folder / WORK).is_dir():
        raise InputError(
            f"{folder} is an unfinished target cache: it has no {MANIFEST}.",
            "Run the same `nds cache build` again; it goes on where it stopped.",
        )
    raise InputError(
        f"{folder} is not a target cache: it has no {MANIFEST}.", "Give the folder that `nds cache build --out` wrote."
    )


class ManifestFile(BaseModel):
    """The fields of `manifest.json` that both formats have; a format adds its own, and others may add more."""

    model_config = ConfigDict(strict=True, extra="allow")

    target_layer_ids: list[int] = Field(min_length=1)
    hidden_size: int = Field(gt=0)

    @field_validator("target_layer_ids")
    @classmethod
    def _ascending(cls, taps: list[int]) -> list[int]:
        if taps != sorted(set(taps)):
            raise ValueError("layers must ascend")
        return taps

    @property
    def extra(self) -> dict[str, Any]:
        """The keys that others have added."""
        return self.model_extra or {}

    @classmethod
    def of(cls, values: Any, path: Path, remedy: str) -> Self:
        """``values``, which were read from ``path``; `InputError` names the field that is missing or impossible."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise input_error(error, str(path), remedy) from None


def split_into_shards(sizes: Sequence[int] | np.ndarray, shard_bytes: int) -> np.ndarray:
    """Shard of each sample of ``sizes`` bytes: one is closed before the sample that would exceed ``shard_bytes``."""
    ends = np.cumsum(sizes, dtype=np.int64)
    shards = np.zeros(len(ends), dtype=np.int64)
    first, shard = 0, 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
        shards[first:stop] = shard
        first, shard = stop, shard + 1
    return shards


def read_index(folder: Path, record: np.dtype, samples: int) -> np.ndarray:  # ``record`` [samples]
    """`samples.idx`; `InputError` unless it is there and has as many bytes as the manifest promises."""
    path, wanted = folder / INDEX, samples * record.itemsize
    if not path.is_file():
        raise InputError(f"{path} is missing.", RESTORE)
    if path.stat().st_size != wanted:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes; {MANIFEST} promises {samples} samples, that is {wanted}.", RESTORE
        )
    return np.fromfile(path, dtype=record)
