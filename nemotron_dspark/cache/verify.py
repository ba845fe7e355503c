"""Is this cache whole? Every checksum, every record's bounds, every sample's values; one sentence a fault."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemotron_dspark.cache.format import CHECKSUMS, INDEX, RECORD, Manifest
from nemotron_dspark.cache.reader import TargetCache, record_faults
from nemotron_dspark.errors import InputError
from nemotron_dspark.files import read_json, sha256

_LIMIT = 20  # faults of one kind that are listed


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    folder: Path
    samples: int
    files: int  # with a checksum that was compared
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return not self.problems


def verify(folder: Path | str, *, progress: Callable[[str], None] = lambda name: None) -> VerifyReport:
    """Read every byte of a cache and say what is wrong with it. A cache without checksums (DeepSpec's) is checked for
    bounds and values only; that is not a problem.

    Raises:
        InputError: ``folder`` has no manifest that can be read.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    problems = []
    digests = _digests(folder, problems)
    for name, digest in digests.items():
        progress(name)
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing.")
        elif sha256(path) != digest:
            problems.append(f"{path} is not what was written: its checksum differs.")
    if digests:
        unknown = {INDEX, *manifest.shard_files} - digests.keys()
        problems += [f"{folder / CHECKSUMS} has no checksum of {name}." for name in sorted(unknown)]
    progress("samples")
    index = folder / INDEX
    if not index.is_file():
        problems.append(f"{index} is missing.")
    elif index.stat().st_size != manifest.num_samples * RECORD.itemsize:
        problems.append(f"{index} does not have the {manifest.num_samples} records that the manifest promises.")
    else:
        faults = record_faults(folder, manifest, np.fromfile(index, dtype=RECORD), _LIMIT)
        problems += faults or _value_faults(TargetCache(folder))
    return VerifyReport(folder, manifest.num_samples, len(digests), tuple(dict.fromkeys(problems)))


def check_mask_token(cache: TargetCache, mask_token_id: int) -> None:
    """`InputError` naming the sample in which the draft's mask token occurs."""
    for sample_id in range(len(cache)):
        if (cache.fields(sample_id)[0] == mask_token_id).any():
            raise InputError(
                f"Sample {sample_id} of {cache.folder} contains the draft's mask token {mask_token_id}.",
                "Set draft.mask_token_id to a token the data never uses.",
            )


def _digests(folder: Path, problems: list[str]) -> dict[str, str]:
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except InputError as error:
        problems.append(error.what)
        return {}
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or values.get("algorithm") != "sha256":
        problems.append(f"{path} does not hold sha256 checksums.")
        return {}
    return files


def _value_faults(cache: TargetCache) -> list[str]:
    faults: list[str] = []
    for sample_id in range(len(cache)):
        input_ids, attention, loss, taps, last = cache.fields(sample_id)
        where = (
            f"{cache.folder / cache.manifest.shard_files[int(cache.index['shard_id'][sample_id])]}: sample {sample_id}"
        )
        if (input_ids < 0).any():
            faults.append(f"{where} has a negative token id.")
        if (attention != 1).any() or (loss > 1).any():
            faults.append(f"{where} has a mask with values other than 0 and 1, or padding.")
        # bfloat16 with all exponent bits set is an infinity or not a number
        if ((taps & 0x7F80) == 0x7F80).any() or ((last & 0x7F80) == 0x7F80).any():
            faults.append(f"{where} has hidden states that are not finite.")
        if len(faults) >= _LIMIT:
            break
    return faults
