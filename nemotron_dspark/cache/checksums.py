"""Checksums of a cache: one of every file in `checksums.json`, and one of every sample in `samples.crc`.

The first say whether a folder is what was written, the second whether a sample is, at the moment it is read.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from nemotron_dspark.cache.layout import INDEX, MANIFEST
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json, sha256, write_json

CHECKSUMS = "checksums.json"
_REMEDY = "Restore the file or build the cache again."
SAMPLES = "samples.crc"  # little-endian uint32 [samples]: CRC-32 of a sample's fields, one after the other


def sample_checksum(fields: Iterable[np.ndarray]) -> int:
    """CRC-32 over ``fields``, contiguous buffers."""
    value = 0
    for field in fields:
        value = zlib.crc32(field.data, value)
    return value


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write `checksums.json`: ``digests`` by file name, and the digest of them all."""
    files = dict(sorted(digests.items()))
    write_json(folder / CHECKSUMS, {"algorithm": "sha256", "files": files, "digest": _digest(files)})


def read_checksums(folder: Path) -> dict[str, str]:
    """Digest of each file by its name; empty where there are none, as in DeepSpec's own caches.

    Raises:
        InputError: they are damaged themselves, or gone while those of the samples are there.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        if (folder / SAMPLES).is_file():
            raise InputError(f"{path} is missing, and {SAMPLES} is there.", _REMEDY)
        return {}
    values = read_json(path)
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or values.get("algorithm") != "sha256":
        raise InputError(f"{path} does not hold sha256 checksums.", _REMEDY)
    if set(values) - {"algorithm", "files", "digest"} or values.get("digest", _digest(files)) != _digest(files):
        raise InputError(f"{path} is not what was written.", _REMEDY)
    return files


def changed_files(folder: Path, digests: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """One sentence for each of ``names`` in ``digests`` that is missing or has another checksum."""
    faults = []
    for name in names:
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing.")
        elif sha256(path) != digests[name]:
            faults.append(f"{path} is not what was written: its checksum differs.")
    return faults


def read_sample_checksums(folder: Path, samples: int) -> np.ndarray | None:
    """uint32 [samples]; None where there are none.

    Raises:
        InputError: it is not of this many samples.
    """
    path = folder / SAMPLES
    if not path.is_file():
        return None
    values = np.fromfile(path, dtype="<u4")
    if len(values) != samples or path.stat().st_size != 4 * samples:
        raise InputError(f"{path} does not have the checksums of {samples} samples.", _REMEDY)
    return values


def fingerprint(folder: Path) -> str:
    """Digest of what identifies a cache's content: its checksums where it has them, else its manifest and index."""
    names = [CHECKSUMS] if (folder / CHECKSUMS).is_file() else [MANIFEST, INDEX]
    return hashlib.sha256("".join(sha256(folder / name) for name in names).encode()).hexdigest()[:32]


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
