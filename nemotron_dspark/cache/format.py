"""DeepSpec's target cache, version 2: where every byte lies.

A cache is a folder with `manifest.json`, `samples.idx` (one fixed record a sample) and `shard-NNNNN.bin`. Lengths alone
decide the whole layout, so it is known before the first hidden state is computed.
"""

import dataclasses
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json

VERSION = 2
MANIFEST = "manifest.json"
INDEX = "samples.idx"
CHECKSUMS = "checksums.json"

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


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every sample lies; samples in order of their id, none across two shards."""

    index: np.ndarray  # RECORD [samples]
    shard_sizes: tuple[int, ...]  # bytes
    shard_starts: tuple[int, ...]  # first sample of each shard, and the number of samples as last entry

    @property
    def total_bytes(self) -> int:
        return sum(self.shard_sizes) + self.index.nbytes


def lay_out(lengths: Sequence[int] | np.ndarray, *, num_taps: int, hidden_size: int, shard_bytes: int) -> Layout:
    """Layout of samples of these ``lengths``: a shard is closed before the sample that would exceed ``shard_bytes``."""
    per_token = bytes_per_token(num_taps, hidden_size)
    lengths = np.asarray(lengths, dtype=np.int64)
    sizes: list[int] = []
    starts: list[int] = []
    shards = np.zeros(len(lengths), dtype=np.uint32)
    offsets = np.zeros(len(lengths), dtype=np.int64)
    for sample, length in enumerate(lengths.tolist()):
        size = per_token * length
        if not sizes or sizes[-1] + size > shard_bytes:
            sizes.append(0)
            starts.append(sample)
        shards[sample] = len(sizes) - 1
        offsets[sample] = sizes[-1]
        sizes[-1] += size
    index = np.zeros(len(lengths), dtype=RECORD)
    index["sample_id"] = np.arange(len(lengths))
    index["shard_id"] = shards
    index["seq_len"] = lengths
    for name, per_field in zip(FIELDS, field_sizes(1, num_taps, hidden_size), strict=True):
        index[name] = offsets
        offsets = offsets + per_field * lengths
    return Layout(index, tuple(sizes), (*starts, len(lengths)))


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
        path = Path(folder) / MANIFEST
        if not path.is_file():
            unfinished = (Path(folder) / ".build").is_dir()
            raise InputError(
                f"{folder} is {'an unfinished' if unfinished else 'not a'} target cache: it has no {MANIFEST}.",
                "Run the same `nds cache build` again; it goes on where it stopped."
                if unfinished
                else "Give the folder that `nds cache build --out` wrote.",
            )
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path} does not hold a JSON object.", _REMEDY)
        if values.get("version") != VERSION:
            raise InputError(f"{path}: version {values.get('version')!r} is not {VERSION}.", _REMEDY)
        for key, wanted in {**_TYPES, "index_record_size": RECORD_SIZE}.items():
            if values.get(key) != wanted:
                raise InputError(f"{path}: {key} is {values.get(key)!r}, not {wanted!r}.", _REMEDY)
        required = ("num_samples", "num_shards", "target_layer_ids", "hidden_size", "shards")
        try:
            samples, count, taps, hidden, shards = (values.pop(key) for key in required)
            names = tuple(shard["file_name"] for shard in shards)
            ids = [shard["shard_id"] for shard in shards]
            sound = (
                all(type(number) is int for number in (samples, count, hidden, *taps))
                and samples >= 0
                and hidden > 0
                and count == len(shards)
                and ids == list(range(count))
                and taps
                and taps == sorted(set(taps))
                and all(re.fullmatch(r"[\w.-]+", name) for name in names)
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: {' or '.join(required)} is missing or malformed ({error}).", _REMEDY) from None
        if not sound:
            raise InputError(f"{path}: its fields contradict one another or are impossible.", _REMEDY)
        extra = {key: value for key, value in values.items() if key not in ("version", "index_record_size", *_TYPES)}
        return Manifest(samples, tuple(taps), hidden, names, extra)
